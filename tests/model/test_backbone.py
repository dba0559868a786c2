"""The backbone of each family: two adapters in one forward, padding, recomputation, targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from cllm4rec_dist.config import AdapterConfig, RunConfig, validate
from cllm4rec_dist.distributed.engine import Engine, resolve_settings, sharded_loading
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model.backbone import COLLABORATIVE, CONTENT, DualBackbone, load_backbone
from tests.harness import run_ranks
from tests.model.backbones import FAMILIES, WIDTH

LORA = AdapterConfig(kind="lora", rank=2, alpha=4)
B, T, D = 2, 7, WIDTH
DEEPSPEED = Path(__file__).parents[2] / "ds_configs" / "zero3.json"


def embeddings(seed: int, rows: int = B) -> Tensor:
    return torch.randn(rows, T, D, generator=torch.Generator().manual_seed(seed))


def open_backbone(folder: Path, adapter: AdapterConfig = LORA) -> DualBackbone:
    """Load a backbone, and set the second factor of its adapters, which PEFT initializes to zero."""
    dual = load_backbone(folder, adapter, torch.float32, seed=5)
    random = torch.Generator().manual_seed(9)
    for name, parameter in dual.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.3
    return dual.train()


def adapters_of(dual: DualBackbone, which: str) -> dict[str, Tensor]:
    return {name: p for name, p in dual.named_parameters() if "lora_" in name and f".{which}." in name}


def run_both(dual: DualBackbone, between: Callable[[], object] = lambda: None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of both LLMs over different inputs, and all gradients, including those of the inputs.

    Args:
        between: called after the forward and before the backward.
    """
    collaborative, content = embeddings(1).requires_grad_(), embeddings(2, rows=3).requires_grad_()
    hidden, content_hidden = dual(torch.cat([collaborative, content]), None, B * T).split([B, 3])
    losses = [hidden.square().sum(), (content_hidden * embeddings(3, rows=3)).sum()]
    between()
    torch.stack(losses).sum().backward()
    gradients = {name: p.grad.clone() for name, p in dual.named_parameters() if p.grad is not None}
    assert collaborative.grad is not None
    assert content.grad is not None
    return [loss.item() for loss in losses], gradients | {"in": collaborative.grad, "content in": content.grad}


def engine_runs(world: World, folders: dict[str, str]) -> dict[str, Any]:
    """By family: hidden states of the engine, and norms of gradients of adapters and inputs."""
    results: dict[str, Any] = {}
    for family, folder in folders.items():
        tree = {"stage": "pretrain", "corpus": "-", "backbone": folder, "output": "-", "deepspeed": str(DEEPSPEED)}
        settings = resolve_settings(validate(RunConfig, tree, "test"))
        with sharded_loading(settings):
            dual = load_backbone(Path(folder), LORA, torch.float32, seed=5)
        trained = [p for p in dual.parameters() if p.requires_grad]
        engine = Engine(dual, settings, torch.optim.AdamW(trained, lr=0.0), dual.layers)
        inputs = [embeddings(1).requires_grad_(), embeddings(2).requires_grad_()]
        hidden, content = engine(torch.cat(inputs), None, B * T).chunk(2)
        complete = engine.backward(hidden.square().sum() + content.square().sum())
        norms = {name: float(gradient.norm()) for name, gradient in engine.gradients().items()}
        engine.step(1e-3)
        results[family] = {
            "hidden": hidden.detach(),
            "content": content.detach(),
            "complete": complete,
            "norms": norms,
            "input": [float(x.grad.norm()) for x in inputs if x.grad is not None],
        }
    return results


@pytest.mark.slow
def test_every_family_runs_in_the_engine_and_equals_the_bare_decoder(folders: dict[str, Path]) -> None:
    (results,) = run_ranks(1, engine_runs, {family: str(folder) for family, folder in folders.items()})
    for family, folder in folders.items():
        got = results[family]
        # Adapters are initialized to the identity, so the pretrained decoder is the reference.
        decoder = AutoModelForCausalLM.from_pretrained(folder).base_model
        for name, seed in (("hidden", 1), ("content", 2)):
            expected = decoder(inputs_embeds=embeddings(seed)).last_hidden_state
            torch.testing.assert_close(got[name], expected.detach(), rtol=1e-4, atol=1e-5)
        assert got["complete"]
        assert len(got["input"]) == 2
        assert all(norm > 0 for norm in got["input"])
        for which in (COLLABORATIVE, CONTENT):
            second_factors = [norm for name, norm in got["norms"].items() if "lora_B" in name and f".{which}." in name]
            assert second_factors, family
            assert all(norm > 0 for norm in second_factors), (family, which)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_do_not_see_each_other(folders: dict[str, Path], family: str) -> None:
    """Documents of 3, 4 and 5 tokens and two padding positions: each computes as alone, forward and gradient."""
    dual = open_backbone(folders[family]).eval()
    packed = embeddings(1).requires_grad_()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0]])
    weights = embeddings(2)
    for llms in ((0, 0, 0), (1, 1, 1), (0, 1, 1)):
        # In the third case the first document belongs to the collaborative LLM, and the next ones to the content LLM.
        together = dual(packed, positions, sum(end for end, llm in zip((3, 4, 7), llms, strict=True) if llm == 0))
        (gradient,) = torch.autograd.grad((together * weights)[:, :5].sum() + (together * weights)[0, 5:].sum(), packed)
        for (row, start, stop), llm in zip(((0, 0, 3), (0, 3, 7), (1, 0, 5)), llms, strict=True):
            document = packed[row : row + 1, start:stop].detach().requires_grad_()
            alone = dual(document, None, 0 if llm else stop - start)
            torch.testing.assert_close(together[row : row + 1, start:stop], alone, rtol=1e-4, atol=1e-5)
            (expected,) = torch.autograd.grad((alone * weights[row : row + 1, start:stop]).sum(), document)
            torch.testing.assert_close(gradient[row : row + 1, start:stop], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_activations_uses_the_adapter_of_its_forward(folders: dict[str, Path], family: str) -> None:
    losses, gradients = run_both(open_backbone(folders[family]))
    recomputing = open_backbone(folders[family])
    recomputing.enable_activation_checkpointing()
    calls = count_forwards(recomputing)
    again, gradients_again = run_both(recomputing, between=lambda: recomputing(embeddings(4), None, 3))
    assert calls[0] == 3, "once forward, once between, once recomputed"
    assert again == losses
    assert gradients_again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023


def count_forwards(dual: DualBackbone) -> list[int]:
    """Count the forwards of an adapted layer."""
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1

    next(module for module in dual.modules() if isinstance(module, LoraLayer)).register_forward_hook(hook)
    return calls


def test_activation_checkpointing_works_without_adapters(folders: dict[str, Path]) -> None:
    settings = AdapterConfig(kind="full")
    losses, gradients = run_both(open_backbone(folders["gpt2"], settings))
    recomputing = open_backbone(folders["gpt2"], settings)
    recomputing.enable_activation_checkpointing()
    again, gradients_again = run_both(recomputing)
    assert again == losses
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_llm_uses_only_its_adapter(folders: dict[str, Path], family: str) -> None:
    dual = open_backbone(folders[family])
    first, second = adapters_of(dual, COLLABORATIVE), adapters_of(dual, CONTENT)
    assert first
    assert len(first) == len(second)
    assert {id(p) for p in first.values()}.isdisjoint(id(p) for p in second.values())
    x = embeddings(1)
    both = [dual(x, None, content_start) for content_start in (B * T, 0)]
    assert not torch.allclose(both[0], both[1], atol=1e-3)

    for hidden, used, unused in ((both[0], first, second), (both[1], second, first)):
        dual.zero_grad()
        hidden.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in used.values())
        # Zero instead of None: ZeRO-3 must reduce the same gradients on every rank, whatever its documents.
        assert all(p.grad is not None and not p.grad.any() for p in unused.values())

    for p in second.values():
        p.data.add_(1.0)
    changed = [dual(x, None, content_start) for content_start in (B * T, 0)]
    torch.testing.assert_close(changed[0], both[0], rtol=0, atol=0)
    assert not torch.allclose(changed[1], both[1], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_over_both_llms_equals_two_passes(folders: dict[str, Path], family: str) -> None:
    """Forward and all gradients, with different numbers of rows."""
    together, alone = open_backbone(folders[family]), open_backbone(folders[family])
    losses, gradients = run_both(together)
    inputs = [embeddings(1).requires_grad_(), embeddings(2, rows=3).requires_grad_()]
    hidden, content = alone(inputs[0], None, B * T), alone(inputs[1], None, 0)
    expected = [hidden.square().sum(), (content * embeddings(3, rows=3)).sum()]
    torch.stack(expected).sum().backward()
    assert losses == pytest.approx([loss.item() for loss in expected], rel=1e-6)
    expected_gradients = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    for name, gradient in expected_gradients.items() | {("in", inputs[0].grad), ("content in", inputs[1].grad)}:
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_adapters_are_initialized_by_the_seed_to_the_identity(folders: dict[str, Path]) -> None:
    first, second, other = (load_backbone(folders["gpt2"], LORA, torch.float32, seed) for seed in (1, 1, 2))
    weights = [dict(dual.named_parameters()) for dual in (first, second, other)]
    name = next(n for n in weights[0] if "lora_A" in n)
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert not torch.equal(weights[0][name], weights[2][name])
    assert all(not p.any() for n, p in weights[0].items() if "lora_B" in n)


def test_the_adapter_kind_selects_what_is_trained(folders: dict[str, Path]) -> None:
    def trained(kind: str) -> list[str]:
        dual = load_backbone(folders["gpt2"], AdapterConfig(kind=kind, rank=2), torch.bfloat16, 0)
        assert all(p.dtype is torch.bfloat16 for n, p in dual.named_parameters() if n != "anchor")
        return [name for name, p in dual.named_parameters() if p.requires_grad]

    assert trained("none") == ["anchor"]
    assert all("lora_" in name for name in trained("lora"))
    assert not any("lora_" in name or "wte" in name for name in trained("full"))
    assert any("c_attn" in name for name in trained("full"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_layers(folders: dict[str, Path], family: str) -> None:
    dual = open_backbone(folders[family])
    assert len(dual.layers) == dual.decoder.config.num_hidden_layers
    inside = {id(p) for layer in dual.layers for p in layer.parameters()}
    assert all(id(p) in inside for name, p in dual.named_parameters() if "lora_" in name)


def test_targets_choose_the_layers(folders: dict[str, Path]) -> None:
    settings = AdapterConfig(kind="lora", rank=2, targets=("q_proj",))
    adapted = [name for name, _ in load_backbone(folders["llama"], settings, torch.float32, 0).named_parameters()]
    assert all(".q_proj." in name for name in adapted if "lora_" in name)
    assert sum("lora_A" in name for name in adapted) == 2 * 2, "two adapters in two layers"
