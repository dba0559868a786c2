"""Products of a file that can be added to a run: a shop's whole feed has known ones and ones without a text, too.

They are left out and counted here. Where products are named one by one (`Recommender.with_items`, a request to the
service) each of them must be new and have a text. Without torch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cllm4rec_dist.errors import DataError
from cllm4rec_dist.serving.item_catalog import ItemCatalog
from cllm4rec_dist.serving.new_items import NewItem
from cllm4rec_dist.suggestions import plural

if TYPE_CHECKING:
    from cllm4rec_dist.evaluation.text_items import TextItems

logger = logging.getLogger(__name__)

_KNOWN_WORD = "word that a trained item's title or description has"


def new_products(field: str, products: Sequence[NewItem], items: ItemCatalog) -> tuple[NewItem, ...]:
    """Return the products that are not in the catalog and have a text, and log how many are left out.

    Raises:
        DataError: if there are products, but none is left.
    """
    unknown = [product for product in products if items.row(product.item) is None]
    kept = tuple(product for product in unknown if product.text)
    num_known, textless = len(products) - len(unknown), [product.item for product in unknown if not product.text]
    if products and not kept:
        reasons = [f"items of the run already: {num_known:,}"] if num_known else []
        reasons += [f"without a text: {len(textless):,}, such as {textless[0]!r}"] if textless else []
        raise DataError(
            field,
            products[0].item,
            f"is no new product with a text, nor is any other of {len(products):,} ({'; '.join(reasons)})",
            "Give a file with new products, or leave the option out.",
        )
    if num_known:
        of_all = f"{num_known:,} of {plural(len(products), 'product')}"
        logger.info("%s: left out %s: items of the run already", field, of_all)
    _warn_left_out(field, textless, products, "a text")
    return kept


def with_known_words(field: str, products: Sequence[NewItem], texts: TextItems) -> tuple[NewItem, ...]:
    """Return the products whose text has a word that the run knows, and log how many are left out.

    Raises:
        DataError: if there are products, but none is left.
    """
    if not products:
        return ()
    has_words = (texts.rows_of([product.text for product in products]).norm(dim=1) > 0).tolist()
    kept = tuple(product for product, has_word in zip(products, has_words, strict=True) if has_word)
    without = [product.item for product, has_word in zip(products, has_words, strict=True) if not has_word]
    if not kept:
        others = f", nor has any other of {len(products):,} new products" if len(products) > 1 else ""
        raise DataError(
            f"{field}: text of {products[0].item!r}",
            products[0].text[:60],
            f"has no {_KNOWN_WORD}{others}, so that nothing is known of it",
            "Write more of the text, in the language of the other items.",
        )
    _warn_left_out(field, without, products, f"a {_KNOWN_WORD}")
    return kept


def _warn_left_out(field: str, left_out: Sequence[str], products: Sequence[NewItem], missing: str) -> None:
    if left_out:
        of_all = f"{len(left_out):,} of {plural(len(products), 'product')}"
        logger.warning("%s: left out %s without %s, such as %r", field, of_all, missing, left_out[0])
