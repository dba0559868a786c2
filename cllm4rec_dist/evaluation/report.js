"use strict";
// Show the search box, which does nothing without this script, and hide examples that do not match it.
{
  const box = document.getElementById("search");
  const examples = [...document.querySelectorAll(".example")];
  const plain = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  if (box) {
    const texts = examples.map((example) => plain(example.textContent));
    const count = document.getElementById("search-count");
    const search = () => {
      const words = plain(box.value).split(/\s+/).filter(Boolean);
      let shown = 0;
      examples.forEach((example, index) => {
        const matches = words.every((word) => texts[index].includes(word));
        example.hidden = !matches;
        if (matches) shown += 1;
        if (words.length) example.open = matches && shown <= 3;
      });
      count.textContent = words.length ? `${shown} of ${examples.length} examples` : "";
    };
    box.addEventListener("input", search);
    document.getElementById("searching").hidden = false;
    search();
  }
}
