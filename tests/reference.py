"""A dense reference of the training step: one process, document by document, from the paper's formulas.

It uses nothing of `model/` and `step.py` but the modules that hold decoder, adapters and frozen embeddings.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.tokenizer import TokenSpace
from cllm4rec_dist.model.backbone import DualBackbone, FrozenEmbeddings
from tests.documents import Document


class DenseRun:
    """A run with dense tables, dense logits and plain Adam.

    Args:
        rows: initial `collaborative.users`, `collaborative.items`, `content.users`, `content.items`.
        projections: initial `head.projection` and `input_projection`, if the run has them.
    """

    def __init__(
        self,
        config: RunConfig,
        backbone: DualBackbone,
        words: FrozenEmbeddings,
        space: TokenSpace,
        rows: dict[str, Tensor],
        projections: dict[str, Tensor],
    ) -> None:
        self.config, self.backbone, self.words, self.space = config, backbone, words, space
        self.rows = {name: value.clone().requires_grad_() for name, value in rows.items()}
        self.bias = torch.zeros(space.num_items, requires_grad=True) if config.head.item_bias else None
        cosine = config.head.similarity == "cosine"
        self.log_temperature = torch.tensor(math.log(config.head.temperature), requires_grad=True) if cosine else None
        self.projections = {name: value.clone().requires_grad_() for name, value in projections.items()}
        self.projection = self.projections.get("head.projection")
        self.input_projection = self.projections.get("input_projection")
        self.adapters = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.steps = 0

    def outside(self) -> dict[str, Tensor]:
        """Parameters outside the backbone by name."""
        parameters = dict(self.rows)
        if self.bias is not None:
            parameters["head.bias"] = self.bias
        if self.log_temperature is not None:
            parameters["head.log_temperature"] = self.log_temperature
        return parameters | self.projections

    def _embed(self, which: str, token_ids: Tensor) -> Tensor:
        """Look up the paper's single dense table, [V + U + I, D]."""
        rows = torch.cat([self.rows[f"{which}.users"], self.rows[f"{which}.items"]])
        if self.input_projection is not None:
            rows = rows @ self.input_projection
        return torch.cat([self.words.embedding, rows])[token_ids]

    def _rows(self, which: str, token_ids: Tensor) -> Tensor:
        """Rows of users and items, [n, d]."""
        rows = torch.cat([self.rows[f"{which}.users"], self.rows[f"{which}.items"]])
        return rows[token_ids - self.space.first_user]

    def _items_loss(self, document: Document) -> Tensor:
        embedded = self._embed("collaborative", torch.from_numpy(document.token_ids))
        hidden = self.backbone(embedded[None], None, len(embedded))[0]
        items = self.rows["collaborative.items"]
        total = torch.zeros((), dtype=hidden.dtype)
        for query, target in zip(document.target_query.tolist(), document.targets.tolist(), strict=True):
            position = int(document.queries[query])
            state, length = hidden[position], math.sqrt(items.shape[1])
            if self.projection is not None:
                state = (state / state.square().mean().sqrt()) @ self.projection
            if self.config.head.pool_residual:
                read = torch.from_numpy(document.token_ids[: position + 1])
                read = read[read >= self.space.first_item]
                if len(read):
                    pooled = self._rows("collaborative", read).sum(0)
                    state = state + F.normalize(pooled, dim=0) * length
            if self.log_temperature is None:
                logits = items @ state
            else:
                shortest = length / 2 if self.projection is not None else 1e-12
                direction = state / state.square().sum().add(1e-30).sqrt().clamp_min(shortest)
                logits = F.normalize(items, dim=1) @ direction / self.log_temperature.exp()
            if self.bias is not None:
                logits = logits + self.bias
            total = total - torch.log_softmax(logits, 0)[target]
        return total

    def _words_loss(self, document: Document) -> Tensor:
        embedded = self._embed("content", torch.from_numpy(document.token_ids))
        hidden = self.backbone(embedded[None], None, 0)[0]
        logits = hidden[torch.from_numpy(document.queries)] @ self.words.head.T
        return F.cross_entropy(logits, torch.from_numpy(document.targets.astype("int64")), reduction="sum")

    def losses(self, users: list[Document], texts: list[Document]) -> dict[str, Tensor]:
        """Mean of each term over the whole step."""
        tokens = torch.tensor(
            sorted({int(t) for d in [*users, *texts] for t in d.token_ids if t >= self.space.first_user})
        )
        collaborative, content = self._rows("collaborative", tokens), self._rows("content", tokens)
        embeddings = self.config.embeddings
        mutual = (
            embeddings.lambda_c / 2 * (content - collaborative).square().sum()
            + embeddings.lambda_l / 2 * collaborative.square().sum()
        )
        return {
            "items": sum(self._items_loss(d) for d in users) / sum(len(d.targets) for d in users),
            "text": sum(self._words_loss(d) for d in texts) / sum(len(d.targets) for d in texts),
            "mutual": mutual / len(tokens),
        }

    def step(self, users: list[Document], texts: list[Document], factor: float) -> dict[str, Any]:
        """Take one clipped Adam step; return losses, norm and the gradients before clipping."""
        everything = self.outside() | self.adapters
        losses = self.losses(users, texts)
        sum(losses.values()).backward()
        gradients = {
            name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in everything.items()
        }
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        clip = min(1.0, self.config.optimizer.max_grad_norm / (norm.item() + 1e-6))
        self.steps += 1
        sparse = (
            {"collaborative.users", "content.users", "content.items"}
            if self.config.optimizer.sparse_embedding_updates
            else set()
        )
        for name, parameter in everything.items():
            rate = self.config.optimizer.embeddings_lr if name in self.outside() else self.config.optimizer.lr
            self._adam(name, parameter, gradients[name] * clip, rate * factor, sparse=name in sparse)
            parameter.grad = None
        return {"losses": {k: v.item() for k, v in losses.items()}, "norm": norm.item(), "gradients": gradients}

    @torch.no_grad()
    def _adam(self, name: str, parameter: Tensor, gradient: Tensor, lr: float, *, sparse: bool) -> None:
        low, high = self.config.optimizer.betas
        first, second = self.moments.setdefault(name, (torch.zeros_like(parameter), torch.zeros_like(parameter)))
        moved = (
            (gradient != 0).any(dim=-1, keepdim=True).expand_as(gradient)
            if sparse
            else torch.ones_like(gradient, dtype=torch.bool)
        )
        first[moved] = (low * first + (1 - low) * gradient)[moved]
        second[moved] = (high * second + (1 - high) * gradient**2)[moved]
        correction = 1 - low**self.steps, 1 - high**self.steps
        update = lr * (first / correction[0]) / ((second / correction[1]).sqrt() + 1e-8)
        parameter[moved] -= update[moved]
