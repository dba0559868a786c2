"""Settings of the baselines. A file of them is read before ranks start, so this module imports no models."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from cllm4rec_dist.config import METRIC_NAME, StrictModel
from cllm4rec_dist.evaluation.baseline_names import BaselineName

_Weight = Annotated[float, Field(gt=0, le=1e9)]
"""Strength of a regularizer or confidence in a grid. Far larger ones, as infinity, overflow the models' float32."""


class BaselineConfig(StrictModel):
    """Baselines to run and the grids that validation selects from."""

    file_kind: ClassVar[str | None] = "settings of baselines"

    names: tuple[BaselineName, ...] = Field(default=("popularity", "ease", "title_ease", "ials"), min_length=1)
    """Baselines to run, in this order. `sparse_ease` takes the place of `ease` and `title_ease` if these do not fit."""
    select_by: str = "ndcg@100"
    """Validation metric that selects among the candidates of a grid."""
    ease_lambdas: tuple[_Weight, ...] = Field(default=(50.0, 100.0, 200.0, 500.0), min_length=1)
    """L2 weights of EASE."""
    title_ease_lambdas: tuple[_Weight, ...] = Field(default=(100.0, 200.0, 500.0), min_length=1)
    """L2 weights of the title-aware EASE."""
    title_ease_alphas: tuple[_Weight, ...] = Field(default=(3.0, 10.0, 30.0), min_length=1)
    """Weights of the text Gram matrix relative to the interactions in the title-aware EASE."""
    sparse_ease_neighbors: PositiveInt = 100
    """Neighbors by which the sparse EASE predicts an item."""
    sparse_ease_lambdas: tuple[_Weight, ...] = Field(default=(100.0, 200.0, 500.0), min_length=1)
    """L2 weights of the sparse EASE."""
    sparse_ease_alphas: tuple[_Weight, ...] = Field(default=(10.0,), min_length=1)
    """Weights of the texts in the sparse EASE."""
    ials_factors: tuple[PositiveInt, ...] = Field(default=(64, 256), min_length=1)
    """Numbers of latent factors of iALS."""
    ials_regularizations: tuple[_Weight, ...] = Field(default=(30.0, 100.0, 300.0), min_length=1)
    """L2 weights of iALS."""
    ials_alphas: tuple[_Weight, ...] = Field(default=(5.0, 20.0, 50.0, 100.0), min_length=1)
    """Confidence of a seen item in iALS; an unseen one has 1."""
    ials_iterations: PositiveInt = 15
    """Alternating sweeps of iALS."""
    num_threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of iALS and of the sparse EASE; None uses every core."""
    max_dense_gib: PositiveFloat = 2.0
    """Memory limit of the two dense [I, I] float32 matrices of EASE, in GiB; 2 GiB is about 16,000 items."""
    max_grid_interactions: PositiveInt = 30_000_000
    """Largest product of training interactions and candidates of iALS. In a larger split they are compared on a sample
    of users, and the best is fitted on everything."""
    max_fit_minutes: PositiveFloat = 5.0
    """Most CPU minutes, as estimated, of a fit of iALS on everything; the comparison on a sample of users gets half as
    many. Numbers of factors whose fit takes longer are left out or, if all do, the smallest is halved down to 16."""
    max_grid_items: PositiveInt = 400_000
    """Largest product of items and candidates of the sparse EASE. In a larger catalog they are compared on a sample of
    items, and the best is fitted on everything; in a catalog that is larger itself none is."""
    seed: NonNegativeInt = 0
    """Random seed of the initial factors of iALS."""

    @field_validator("select_by")
    @classmethod
    def _is_metric(cls, name: str) -> str:
        if METRIC_NAME.fullmatch(name) is None:
            raise ValueError("must be recall@K or ndcg@K with K >= 1, such as ndcg@100")
        return name
