"""Times in every form that people have, and dates of which nothing says whether the day is first."""

from __future__ import annotations

import datetime as dt
import io

import polars as pl
import pytest

from cllm4rec_dist.corpus.date_order import numeric_formats
from tests.corpus.reading import Read, Refuse, table

TEN = dt.datetime(2024, 3, 1, 10, tzinfo=dt.UTC).timestamp()
DAY = dt.datetime(2024, 3, 1, tzinfo=dt.UTC).timestamp()
SOURCE = table(timestamp="t", separator=";")


def rows(*times: str) -> str:
    return "u;i;t\n" + "".join(f"a;{k};{time}\n" for k, time in enumerate(times))


def day(year: int, month: int, number: int) -> float:
    return dt.datetime(year, month, number, tzinfo=dt.UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2024-03-01T10:00:00Z", TEN),
        ("2024-03-01 10:00", TEN),
        ("2024-03-01T10:00:00.5", TEN + 0.5),
        ("2024-03-01T10:00:00.123456789Z", TEN + 0.123456789),
        ("29.03.2024 10:00:00,250", TEN + 28 * 86400 + 0.25),
        ("29.03.2024\u00a010:00", TEN + 28 * 86400),
        ("29.03.2024\t10:00", TEN + 28 * 86400),
        ("2024/03/01 10:00:00.75 PM", TEN + 12 * 3600 + 0.75),
        ("1 March 2024 10:00:00.5", TEN + 0.5),
        ("2024-03-01T11:00:00+01:00", TEN),
        ("2024-03-01T11:00:00+01", TEN),
        ("2024-03-01 15:30:00+0530", TEN),
        ("2024-03-01 05:30:00-04:30", TEN),
        ("2024-03-01 10:00:00 UTC", TEN),
        ("2024-03-01 10:00:00 +0000 UTC", TEN),
        ("2024-03-01T11:00:00+01:00[Europe/Berlin]", TEN),
        ("20240301T100000Z", TEN),
        ("2024-03-01", DAY),
        ("2024年3月1日", DAY),
        ("2024년 03월 01일 10:00", TEN),
        ("2024-03", DAY),
        ("2024-3-1", DAY),
        ("2024/03/01 10:00:00", TEN),
        ("2024.03.01", DAY),
        ("2024-03-01 10:00:00 PM", TEN + 12 * 3600),
        ("Fri, 01 Mar 2024 11:00:00 +0100", TEN),
        ("Fri, 1 Mar 2024 10:00:00 GMT", TEN),
        ("Fri, 01 Mar 2024 05:00:00 EST", TEN),
        ("1 Mar 2024 10:00:00 +0000", TEN),
        ("Friday, 01-Mar-24 10:00:00 GMT", TEN),
        ("Fri Mar  1 10:00:00 2024", TEN),
        ("Fri Mar 01 10:00:00 UTC 2024", TEN),
        ("Fri Mar 01 11:00:00 +0100 2024", TEN),
        ("Mar 1, 2024 10:00:00 PM", TEN + 12 * 3600),
        ("Friday, March 1, 2024 10:00 AM", TEN),
        ("March 1st, 2024", DAY),
        ("1 March 2024", DAY),
        ("01-MAR-24", DAY),
        ("1-Mar-1968", day(1968, 3, 1)),
        ("01/Mar/2024:11:00:00 +0100", TEN),
        ("03 01, 2024", DAY),
        ("1709287200", TEN),
        ("1709287200.5", TEN + 0.5),
        ("1709287200000", TEN),
        ("1709287200000000", TEN),
        ("1709287200000000000", TEN),
        ("1.7092872E9", TEN),
        ("-86400", -86400.0),
        ("0", 0.0),
        ("13/12/2024", day(2024, 12, 13)),
        ("12/13/24", day(2024, 12, 13)),
        ("13.12.2024 12:30:15 AM", day(2024, 12, 13) + 30 * 60 + 15),
        ("12-13-2024 12:30 PM", day(2024, 12, 13) + 12.5 * 3600),
        ("02/02/2024", day(2024, 2, 2)),
    ],
)
def test_a_time_in_any_form(read: Read, text: str, seconds: float) -> None:
    (result,) = read({"i.csv": rows(text)}, **SOURCE).column("timestamp")
    assert result == pytest.approx(seconds, abs=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "yesterday",
        "2024-02-30",
        "2024-13-01",
        "0000-00-00",
        "2024-03-01T25:00:00",
        "13:00 PM",
        "March 32, 2024",
        "Foo 1, 2024",
        "1 Mar 2024 13:00 PM",
        "35/40/2024",
        "1e30",
        "inf",
        "1709287200s",
    ],
)
def test_what_is_no_time_is_counted_with_its_value(read: Read, text: str) -> None:
    result = read({"i.csv": rows("2024-01-01", text, "2024-01-02")}, **SOURCE)
    assert len(result.pairs) == 2
    assert result.lost == {"row that has a time that cannot be read": (1, "i.csv", 3, f"a, 1, {text}")}


@pytest.mark.parametrize(
    ("times", "order", "last"),
    [
        (("13/02/2024", "2024-01-01", "05/06/2024"), "day-first", day(2024, 6, 5)),
        (("02/13/2024", "05/06/2024"), "month-first", day(2024, 5, 6)),
    ],
)
def test_a_day_above_12_decides_the_order_of_its_file(
    read: Read, times: tuple[str, ...], order: str, last: float
) -> None:
    result = read({"i.csv": rows(*times)}, **SOURCE)
    assert result.column("timestamp")[-1] == last
    assert f"INFO: i.csv line 2: t: dates like {times[0]!r} are read as {order}" in result.messages
    assert "WARNING" not in result.messages, "the day decides, and nothing is left open"


def test_each_file_decides_and_an_open_one_follows(read: Read) -> None:
    files = {"a.csv": rows("13/02/2024"), "b.csv": rows("01/02/2024")}
    both = table(["a.csv", "b.csv"], timestamp="t", separator=";")
    result = read(files, **both)
    assert result.column("timestamp") == [day(2024, 2, 13), day(2024, 2, 1)]
    assert "WARNING: b.csv line 2: t: dates like '01/02/2024' are read as day-first" in result.messages
    files["b.csv"] = rows("01/15/2024")
    assert read(files, **both).column("timestamp") == [day(2024, 2, 13), day(2024, 1, 15)]


@pytest.mark.parametrize(
    ("usual", "odd", "said"),
    [
        ("2024-03-0", ["0", "1970-01-01"], "2 of 11 times are far from all the others (2024-03-01 to 2024-03-09)"),
        ("2024-03-0", ["9999-12-31"], "such as 9999-12-31. They are kept as read"),
        ("171000000", ["0.0"], "such as 1970-01-01"),
        ("1997-03-0", ["0"], "1 of 10 times"),
    ],
)
def test_times_far_from_all_the_others_are_warned_of(read: Read, usual: str, odd: list[str], said: str) -> None:
    result = read({"i.csv": rows(*[f"{usual}{number}" for number in range(1, 10)], *odd)}, **SOURCE)
    assert "WARNING: i.csv line 11: t: " in result.messages
    assert said in result.messages


@pytest.mark.parametrize(
    "times",
    [
        ["0", "1", "2", "3"],
        ["0"] * 4,
        ["1970-01-01", "1970-01-02"],
        ["1996-05-01", "2003-01-01", "2012-01-01", "2013-01-01", "2014-01-01", "2014-02-01"],
        ["", "", "2024-01-01"],
        [""],
    ],
)
def test_times_that_belong_together_are_not_warned_of(read: Read, times: list[str]) -> None:
    assert "WARNING" not in read({"i.csv": rows(*times)}, **SOURCE).messages


@pytest.mark.parametrize(
    ("files", "where"),
    [
        ([("01/02/2024", "03/04/2024")], "a.csv line 2: t: '01/02/2024'"),
        ([("13/02/2024", "03/14/2024")], "a.csv line 2: t: '13/02/2024'"),
        ([("13/02/2024",), ("01/15/2024",), ("2024-01-01", "01/02/2024")], "c.csv line 3: t: '01/02/2024'"),
    ],
)
def test_dates_that_decide_nothing_or_contradict_each_other_are_refused(
    refuse: Refuse, files: list[tuple[str, ...]], where: str
) -> None:
    contents = {f"{letter}.csv": rows(*times) for letter, times in zip("abc", files, strict=False)}
    message = refuse(contents, **table(list(contents), timestamp="t", separator=";"))
    assert message.startswith(where)
    assert "time_format" in message


def of_2023(number: int, pattern: str) -> str:
    """Return the date of a day of January to July 2023."""
    return f"{dt.date(2023, 1, 1) + dt.timedelta(days=number):{pattern}}"


@pytest.mark.parametrize("pattern", ["%y-%m-%d", "%y/%m/%d", "%y.%m.%d 10:00", "%d-%m-%y", "%d/%m/%y", "%d.%m.%y"])
def test_the_part_that_takes_more_values_is_the_day(read: Read, pattern: str) -> None:
    texts = [of_2023(number, pattern) for number in range(0, 200, 7)]
    days = [day(2023, 1, 1) + 86400 * number for number in range(0, 200, 7)]
    result = read({"i.csv": rows(*texts)}, **SOURCE)
    assert [time // 86400 * 86400 for time in result.column("timestamp")] == days
    assert f"are read as {'year-first' if pattern.startswith('%y') else 'day-first'}" in result.messages


def test_the_files_of_a_source_decide_together_what_no_file_decides(read: Read) -> None:
    texts = [of_2023(number, "%y/%m/%d") for number in range(0, 200, 7)]
    files = {f"{number:02d}.csv": rows(text) for number, text in enumerate(texts)}
    result = read(files, **table(list(files), timestamp="t", separator=";"))
    assert result.column("timestamp") == [day(2023, 1, 1) + 86400 * number for number in range(0, 200, 7)]


@pytest.mark.parametrize(
    ("texts", "seconds"),
    [
        (("96-05-13", "97-01-02"), [day(1996, 5, 13), day(1997, 1, 2)]),
        (("02-05-96", "13-05-97"), [day(1996, 5, 2), day(1997, 5, 13)]),
        (tuple(f"25-01-{d:02d}" for d in range(3, 30, 5)), [day(2025, 1, d) for d in range(3, 30, 5)]),
        (tuple(f"{d:02d}-01-25" for d in range(3, 30, 5)), [day(2025, 1, d) for d in range(3, 30, 5)]),
        (("13/02/24",), [day(2024, 2, 13)]),
        (("13.02.24", "14.02.25"), [day(2024, 2, 13), day(2025, 2, 14)]),
        (("2.13.24",), [day(2024, 2, 13)]),
        (("05-05-05",), [day(2005, 5, 5)]),
    ],
)
def test_few_dates_of_two_digit_years(read: Read, texts: tuple[str, ...], seconds: list[float]) -> None:
    assert read({"i.csv": rows(*texts)}, **SOURCE).column("timestamp") == seconds


@pytest.mark.parametrize(
    "texts",
    [
        ("25-01-23",),
        ("25-01-23", "25-01-24", "25-01-25"),
        ("23-01-25", "24-02-25"),
        tuple(f"01-{month:02d}-{year:02d}" for year in range(5, 25) for month in range(1, 13)),
        tuple(f"15-{month:02d}-{year:02d}" for year in range(19, 25) for month in range(1, 13)),
        ("25-01-23", "13-14-25"),
    ],
)
def test_two_digit_years_that_may_be_days_are_refused(refuse: Refuse, texts: tuple[str, ...]) -> None:
    message = refuse({"i.csv": rows(*texts)}, **SOURCE)
    assert "is ambiguous" in message
    assert "'%y-%m-%d'" in message


@pytest.mark.parametrize(
    ("texts", "time_format"),
    [
        (("01112025", "24112025", "05122025"), "%d%m%Y"),
        (("11012025", "11242025"), "%m%d%Y"),
        (("20251124", "20240101"), "%Y%m%d"),
        (("202511", "202401"), "%Y%m"),
        (("11.2025", "01.2024"), "%m.%Y"),
    ],
)
def test_numbers_that_are_all_dates_are_read_as_dates(read: Read, texts: tuple[str, ...], time_format: str) -> None:
    seconds = [dt.datetime.strptime(text, time_format).replace(tzinfo=dt.UTC).timestamp() for text in texts]
    source = table(timestamp="t", separator=";", time_format=time_format)
    assert read({"i.csv": rows(*texts)}, **source).column("timestamp") == seconds
    result = read({"i.csv": rows(*texts, "NULL")}, **SOURCE)
    assert result.column("timestamp") == [*seconds, None]
    largest = max(texts, key=float).lstrip("0")
    assert f"numbers like {largest} are all dates and are read as {time_format}" in result.messages


def test_integers_have_lost_the_zero_of_the_day(read: Read) -> None:
    sink = io.BytesIO()
    pl.DataFrame({"u": ["a", "a"], "i": ["1", "2"], "t": [1112025, 24112025]}).write_parquet(sink)
    seconds = [day(2025, 11, 1), day(2025, 11, 24)]
    for options in ({}, {"time_format": "%d%m%Y"}):
        result = read({"i.parquet": sink.getvalue()}, **table("i.parquet", timestamp="t", **options))
        assert result.column("timestamp") == seconds


def test_numbers_that_are_dates_in_two_forms_are_refused(refuse: Refuse) -> None:
    message = refuse({"i.csv": rows("01112025", "05122025")}, **SOURCE)
    assert message.startswith("i.csv line 3: t: '5122025' is ambiguous")
    assert "'%d%m%Y' or '%m%d%Y'" in message


@pytest.mark.parametrize("texts", [("1", "2", "3"), ("20251124", "20251199"), ("11.5", "12.5"), ("8640000", "9000000")])
def test_counters_and_early_seconds_are_times(read: Read, texts: tuple[str, ...]) -> None:
    assert read({"i.csv": rows(*texts)}, **SOURCE).column("timestamp") == [float(text) for text in texts]


@pytest.mark.parametrize(
    ("text", "time_format", "seconds"),
    [
        ("01/03/2024 10:00", "%d/%m/%Y %H:%M", TEN),
        ("03/01/2024 10:00:00 AM", "%m/%d/%Y %I:%M:%S %p", TEN),
        ("01/03/2024 11:00 +0100", "%d/%m/%Y %H:%M %z", TEN),
        ("10:00 01.03.2024", "%H:%M %d.%m.%Y", TEN),
        ("2024-03-01 10:00:00.123456", "%Y-%m-%d %H:%M:%S.%f", TEN + 0.123456),
        ("20240301", "%Y%m%d", DAY),
        ("2024-03", "%Y-%m", DAY),
        ("1709287200", "%s", TEN),
    ],
)
def test_the_recipe_gives_the_format(read: Read, text: str, time_format: str, seconds: float) -> None:
    source = table(timestamp="t", separator=";", time_format=time_format)
    result = read({"i.csv": rows(text, "NULL", "rubbish", text)}, **source)
    assert result.column("timestamp") == [pytest.approx(seconds, abs=1e-5), None, pytest.approx(seconds, abs=1e-5)]
    assert result.lost["row that has a time that cannot be read"][:3] == (1, "i.csv", 4)


@pytest.mark.parametrize("time_format", ["%Q", "abc", "%H:%M", ""])
def test_a_format_by_which_no_time_can_be_read_is_refused(refuse: Refuse, time_format: str) -> None:
    message = refuse({"i.csv": rows("1")}, **table(timestamp="t", time_format=time_format))
    assert "is not a strptime format" in message


@pytest.mark.parametrize(
    ("text", "day_first", "month_first"),
    [
        ("3/4/2024", "%d/%m/%Y", "%m/%d/%Y"),
        ("03.04.24 10:30", "%d.%m.%y %H:%M", "%m.%d.%y %H:%M"),
        ("3-4-2024, 10:30:00 AM", "%d-%m-%Y, %I:%M:%S %p", "%m-%d-%Y, %I:%M:%S %p"),
    ],
)
def test_the_format_that_is_proposed_has_the_form_of_the_file(
    read: Read, refuse: Refuse, text: str, day_first: str, month_first: str
) -> None:
    message = refuse({"i.csv": rows(text)}, **SOURCE)
    assert f"for example '{day_first}' or '{month_first}'" in message
    for proposed, month, number in ((day_first, 4, 3), (month_first, 3, 4)):
        source = table(timestamp="t", separator=";", time_format=proposed)
        (seconds,) = read({"i.csv": rows(text)}, **source).column("timestamp")
        assert day(2024, month, number) <= seconds < day(2024, month, number) + 86400


def test_a_date_of_another_form_has_no_numeric_format() -> None:
    assert numeric_formats("2024-03-01") == {}
    assert numeric_formats("3/4-2024") == {}
