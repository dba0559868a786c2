"""Settings of a run and of a small backbone, section by section; docs and `cllm4rec settings` are made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cllm4rec_dist.config.loading import StrictModel
from cllm4rec_dist.config.renames import BACKBONE_SETTINGS, RUN_SETTINGS

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
METRIC_NAME = re.compile(r"(recall|ndcg)@([1-9][0-9]*)")


class AdapterConfig(StrictModel):
    """What of the backbone learns."""

    kind: Literal["lora", "none", "full"] = "lora"
    """`lora`: one adapter for each LLM on the frozen backbone. `none`: rows only, as in the paper. `full`: the whole
    backbone, shared by both LLMs; for small ones built from a config, which have nothing pretrained to keep."""
    rank: int = Field(default=16, ge=1)
    """LoRA rank."""
    alpha: int = Field(default=32, ge=1)
    """LoRA scale; the update is multiplied with alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the adapters. Its masks depend on the number of ranks; everything else random does not."""
    targets: tuple[str, ...] | None = None
    """Names of the layers that get adapters; every linear layer if left out."""


class EmbeddingsConfig(StrictModel):
    """Where user and item rows start, and their priors."""

    lambda_l: float = Field(default=1e-3, ge=0)
    """Precision of the prior of collaborative rows, N(0, 1/lambda_l), per predicted token."""
    lambda_c: float = Field(default=1e-2, ge=0)
    """Precision of content rows around collaborative ones, N(z_l, 1/lambda_c), per predicted token."""
    init: Literal["prior", "spectral"] = "spectral"
    """Centre of the item prior. `prior`: zero, as in the paper. `spectral`: singular vectors of the training
    interactions and of the items' words."""
    init_text_weight: float = Field(default=0.4, ge=0)
    """Weight of the words against the interactions in a spectral start; 0 leaves them out."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the entries of user and item embeddings dropped at the input."""
    comm_dtype: Literal["fp32", "bf16"] = "fp32"
    """Between ranks. `bf16` rounds looked-up rows on their way to the ranks that read them, and their gradients on the
    way back: half of the bytes. Tables, sums of gradients and the item softmax stay fp32."""


class HeadConfig(StrictModel):
    """Form of the item softmax. The paper's is `dot` without the rest."""

    similarity: Literal["dot", "cosine"] = "cosine"
    """`dot`: tied inner product. `cosine`: inner product of directions over a learned temperature."""
    temperature: float = Field(default=0.1, gt=0)
    """First temperature of the cosine head."""
    item_bias: bool = True
    """Learn a bias for each item."""
    pool_residual: bool = True
    """Add the direction of the sum of the item rows read so far to the hidden state."""
    num_negatives: int = Field(default=0, ge=0)
    """Items drawn for the softmax of a micro-batch in training, over all ranks, beside its targets; 0: all, exact.
    Fewer make the loss too low and the gradients noisy (docs/performance.md). Prediction is exact in any case."""


class MethodConfig(StrictModel):
    """Options of CLLM4Rec that the paper or its code leave open."""

    target: Literal["held_out", "all"] = "held_out"
    """Items of the multinomial likelihood: the masked ones (paper) or all of the user's (the authors' code)."""
    order: Literal["shuffled", "fixed"] = "shuffled"
    """Order of a user's items at each visit: drawn anew (paper) or as stored (the authors' code)."""
    mask_ratio: tuple[float, float] = (0.1, 0.9)
    """Share of a user's items that is masked: drawn uniformly from a range at each visit, or one fixed share."""
    max_history: int = Field(default=256, ge=1)
    """Items of a user put into a prompt at most; a random subset (the last ones with fixed order) beyond."""
    shared_user_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of prompts over items that are trained with one `<user>` row, shared by everybody, in place of the user's
    own: the row that people without one are given afterwards. 0: no such row."""

    @field_validator("mask_ratio", mode="before")
    @classmethod
    def _fixed_share(cls, value: object) -> object:
        return (value, value) if isinstance(value, float) else value

    @model_validator(mode="after")
    def _ordered(self) -> MethodConfig:
        low, high = self.mask_ratio
        if not 0 < low <= high < 1:
            raise ValueError("mask_ratio must be 0 < low <= high < 1")
        return self

    def num_user_rows(self, num_users: int) -> int:
        """Rows of a user table: one for each user and, where there is one, the shared row behind them."""
        return num_users + (self.shared_user_ratio > 0)


class BatchConfig(StrictModel):
    """What one optimizer step reads, over all ranks together."""

    users: int = Field(default=256, ge=1)
    """Users of a step."""
    texts: int = Field(default=32, ge=0)
    """Texts of a step; 0 leaves the content LLM out."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches in which each rank works its part off. The result does not depend on it."""


class OptimizerConfig(StrictModel):
    """AdamW for what the engine trains, its dense or lazy form for the tables."""

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of adapters (or of the backbone)."""
    embeddings_lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate of user and item rows and of the head's parameters."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of adapters; tables have their priors instead."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments, each in [0, 1)."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: hold, or fall to `min_lr_ratio` of the peak at the last step."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Where a falling schedule ends, as a share of the peak."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps of linear rise from zero, at most those of the run."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest joint gradient norm of adapters and tables."""
    sparse_embedding_updates: bool = True
    """Tables that are only looked up (users, content items) update the rows of the batch alone (lazy Adam)."""
    embeddings_state: Literal["fp32", "int8", "cpu"] = "fp32"
    """Adam's moments of user and item rows, twice the size of the rows in fp32. `int8`: packed by bitsandbytes, a
    quarter of that. `cpu`: fp32 in host memory, where rows are then stepped; saves GPU memory and costs the way there
    and back. Checkpoints hold fp32 in any case."""


class ValidationConfig(StrictModel):
    """Ranking of the validation items while training."""

    every_epochs: int = Field(default=1, ge=0)
    """Epochs between validations; 0 never validates."""
    metrics: tuple[str, ...] = ("recall@20", "recall@40", "ndcg@100")
    """Metrics written down, recall@K and ndcg@K; the first one chooses the best checkpoint."""
    batch_users: int = Field(default=256, ge=1)
    """Users ranked at a time by each rank."""
    early_stopping_patience: int = Field(default=0, ge=0)
    """Validations without a better result after which training stops; 0 trains to the end."""


class CheckpointConfig(StrictModel):
    """Checkpoints to resume from."""

    dir: str | None = None
    """Folder or fsspec URL (s3://..., gs://...) that all hosts see; OUTPUT/checkpoints if left out."""
    every_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints; one more is written at the end."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Minutes between checkpoints, beside `every_steps`; not used if left out."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest are kept; the best one is kept beside them."""


class FaultsConfig(StrictModel):
    """What ends a run that goes wrong."""

    collective_timeout_seconds: float = Field(default=600.0, gt=0)
    """A rank that stands still for longer ends the job."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """What to do where a step's loss or gradient is not finite, or the loss explodes: end the run with the batch named,
    or leave the step out and go on."""
    loss_spike_factor: float = Field(default=10.0, gt=1)
    """A loss above so many times its running mean (and above so many nats) is an explosion."""


class RunConfig(StrictModel):
    """One training run: `cllm4rec pretrain` or `cllm4rec finetune`.

    In its paths `~`, `$NAME`, `${NAME}` and `${NAME:-default}` are replaced when a command starts (`preflight.py`).
    """

    renamed_keys: ClassVar[Mapping[str, str]] = RUN_SETTINGS
    file_kind: ClassVar[str | None] = "a run configuration"

    stage: Literal["pretrain", "finetune"]
    """Mutually regularized pretraining or recommendation-oriented finetuning; the entry point sets it."""
    corpus: str
    """Corpus folder or URL, built by `cllm4rec prepare`."""
    backbone: str
    """Folder or hub id of a GPT-2, LLaMA, Mistral or Qwen2 style decoder; the corpus was built with its tokenizer."""
    output: str
    """Local folder of the run: checkpoints, metrics, TensorBoard, resolved configuration. For checkpoints in an object
    store set `checkpoint.dir`."""
    init_from: str | None = None
    """Run folder or checkpoint whose rows and adapters a new run starts from: finetune after pretrain, or go on with
    another catalog (rows are matched by external id, see docs/operations.md)."""
    allow_leak: bool = False
    """Start from a run (`init_from`) that was trained on interactions which this corpus holds out. Evaluations of the
    new run then say how many."""
    resume: str = "auto"
    """`auto`: go on from the newest good checkpoint of this run, if it has one. `none`: start anew; refused where the
    run has checkpoints. Else a checkpoint, or another run, whose newest is gone on from in this run's output."""
    deepspeed: str | None = None
    """DeepSpeed file, such as those in ds_configs/; what the run decides is "auto" there. The package's own zero3.json
    if left out."""
    seed: int = Field(default=0, ge=0)
    """Of everything random."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the backbone and its activations. Tables and optimizer states are fp32."""
    quantization: Literal["none", "nf4"] = "none"
    """Of the frozen backbone. `nf4`: its linear layers in 4 bits (QLoRA, bitsandbytes), computed in `precision`."""
    activation_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more work."""
    epochs: int = Field(default=10, ge=1)
    """Passes over the users."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many steps, whatever the epochs say."""
    shuffle_window: int = Field(default=64, ge=1)
    """Records of a shard mixed with each other; more mixes better and reads more at a time."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of metrics."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where metrics go beside OUTPUT/metrics.jsonl: `tensorboard` (OUTPUT/tensorboard), `wandb`, `mlflow` (each an
    extra to install; see docs/operations.md). One that fails does not end the run."""
    audit: bool = False
    """Have every rank write down which users and texts it read at each step, in OUTPUT/audit, so that `cllm4rec audit`
    can prove that each came exactly once; some 7 bytes an example. OUTPUT must be a folder that all hosts see."""
    adapter: AdapterConfig = AdapterConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    head: HeadConfig = HeadConfig()
    method: MethodConfig = MethodConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()

    @model_validator(mode="after")
    def _frozen_if_quantized(self) -> RunConfig:
        if self.quantization != "none" and self.adapter.kind == "full":
            raise ValueError("quantization is of a frozen backbone: adapter.kind must be lora or none")
        return self


class BackboneConfig(StrictModel):
    """A small decoder to build: `cllm4rec build-backbone`."""

    renamed_keys: ClassVar[Mapping[str, str]] = BACKBONE_SETTINGS
    file_kind: ClassVar[str | None] = "settings of a small backbone"

    family: Literal["gpt2", "llama", "mistral", "qwen2"] = "gpt2"
    """Architecture."""
    hidden_size: int = Field(default=128, ge=8)
    """Width D."""
    num_layers: int = Field(default=2, ge=1)
    """Decoder layers."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads; divides `hidden_size`."""
    vocab_size: int = Field(default=4096, ge=300)
    """Words of the tokenizer at most, trained on the texts of the recipe."""
    max_positions: int = Field(default=512, ge=16)
    """Longest sequence."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of attention and (GPT-2) residual branches."""
    seed: int = Field(default=0, ge=0)
    """Of the random weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> BackboneConfig:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError("hidden_size must be an even multiple of num_heads")
        return self
