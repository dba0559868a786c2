"""Settings of splits: what a recipe holds out for validation and test. `split.py` splits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cllm4rec_dist.config import StrictModel


class RandomSplit(StrictModel):
    """Hold out a random fraction of each user's items."""

    kind: Literal["random"] = "random"
    valid: float = Field(default=0.1, ge=0, lt=1)
    """Fraction for validation, rounded to whole items for each user."""
    test: float = Field(default=0.1, ge=0, lt=1)
    """Fraction for the test."""

    @model_validator(mode="after")
    def _leaves_training(self) -> RandomSplit:
        if self.valid + self.test >= 1:
            raise ValueError("valid + test must be below 1, so that something is left to train on")
        return self


class LastSplit(StrictModel):
    """Hold out each user's last items in time: the last ones for the test, those before them for validation."""

    kind: Literal["last"]
    num_valid: int = Field(1, ge=0)
    """Number of items for validation."""
    num_test: int = Field(1, ge=0)
    """Number of items for the test."""


class UsersSplit(StrictModel):
    """Hold out whole users, who are not trained on, and items of the others (strong generalisation, as in the protocol
    of Mult-VAE, Liang et al., WWW 2018)."""

    kind: Literal["users"]
    valid_users: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the users with three or more items to hold out for validation."""
    test_users: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the users with three or more items to hold out for the test."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Fraction of a held-out user's items to predict from the rest; at least one item is predicted and one shown."""
    valid: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the other users' items for validation, as in a random split."""
    test: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the other users' items for the test."""

    @model_validator(mode="after")
    def _leaves_training(self) -> UsersSplit:
        if self.valid_users + self.test_users == 0:
            raise ValueError("holds out no user; give valid_users or test_users, or write kind: random")
        for names in (("valid_users", "test_users"), ("valid", "test")):
            if sum(getattr(self, name) for name in names) >= 1:
                raise ValueError(f"{' + '.join(names)} must be below 1, so that something is left to train on")
        return self


class ColdItemsSplit(StrictModel):
    """Hold out whole items, with which no interaction is trained on, and a random fraction of the other items; with
    `valid_users` or `test_users` whole users, too."""

    kind: Literal["cold_items"]
    valid_items: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the items to hold out for validation, with all their interactions."""
    test_items: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the items to hold out for the test."""
    valid: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of each user's other items for validation, as in a random split."""
    test: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of each user's other items for the test."""
    valid_users: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the users to hold out for validation, as with kind `users`; they need three items that are not held
    out."""
    test_users: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the users to hold out for the test."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Fraction of a held-out user's other items to predict from the rest; at least one item is predicted and one
    shown."""

    @model_validator(mode="after")
    def _leaves_training(self) -> ColdItemsSplit:
        if self.valid_items + self.test_items == 0:
            raise ValueError("holds out no item; give valid_items or test_items, or write kind: random")
        for names in (("valid_items", "test_items"), ("valid", "test"), ("valid_users", "test_users")):
            if sum(getattr(self, name) for name in names) >= 1:
                raise ValueError(f"{' + '.join(names)} must be below 1, so that something is left to train on")
        # Manifests have every key, so that the default says nothing.
        if self.held_out != type(self).model_fields["held_out"].default and self.valid_users + self.test_users == 0:
            raise ValueError(
                "held_out is a fraction of held-out users' items; give valid_users or test_users, or leave it out"
            )
        return self

    def of_other_items(self) -> RandomSplit | UsersSplit:
        """Return the split of the interactions with items that are not held out."""
        if self.valid_users + self.test_users == 0:
            return RandomSplit(valid=self.valid, test=self.test)
        return UsersSplit(kind="users", **self.model_dump(include=set(UsersSplit.model_fields) - {"kind"}))


class NoSplit(StrictModel):
    """Train on all interactions, for production. There are no held-out items to validate or evaluate with."""

    kind: Literal["none"]


class GivenSplit(StrictModel):
    """Keep the split of the data set's files (RecBole's benchmark files)."""

    kind: Literal["given"]
