"""Settings of runs and backbones, by section; `cllm4rec settings` and the docs are generated from this module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from cllm4rec_dist.config.loading import StrictModel
from cllm4rec_dist.config.renames import BACKBONE_SETTINGS, RUN_SETTINGS

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
BACKBONE_VECTORS = "backbone"
"""Value of `embeddings.item_vectors` for the backbone's hidden states."""
METRIC_NAME = re.compile(r"(recall|ndcg)@([1-9][0-9]*)")
"""A ranking metric: kind and cutoff."""


class AdapterConfig(StrictModel):
    """Trainable parameters of the backbone."""

    kind: Literal["lora", "none", "full"] = "lora"
    """`lora`: an adapter for each LLM on the frozen backbone. `none`: embeddings only, as in the paper. `full`: the
    whole backbone, shared by both LLMs; for small backbones without pretrained weights."""
    rank: int = Field(default=16, ge=1)
    """LoRA rank."""
    alpha: int = Field(default=32, ge=1)
    """LoRA scale; the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout at the input of the adapters. Its masks depend on the number of ranks; all other random draws do not."""
    targets: tuple[str, ...] | None = None
    """Names of the layers with adapters; every linear layer if left out."""


class EmbeddingsConfig(StrictModel):
    """User and item embeddings: priors, initialization, dropout and communication."""

    lambda_l: float = Field(default=1e-3, ge=0)
    """Precision of the prior of collaborative embeddings, N(0, 1/lambda_l), per predicted token."""
    lambda_c: float = Field(default=1e-2, ge=0)
    """Precision of content embeddings around collaborative ones, N(z_l, 1/lambda_c), per predicted token."""
    init: Literal["prior", "spectral"] = "spectral"
    """Mean of the initial item embeddings. `prior`: zero, as in the paper. `spectral`: singular vectors of the training
    interactions and of the items' words, and of `item_vectors`."""
    init_text_weight: float = Field(default=0.4, ge=0)
    """Weight of texts (words and vectors) relative to interactions in spectral initialization; 0 ignores texts."""
    item_vectors: str | None = None
    """Dense vectors of the items' texts for spectral initialization: a Parquet file with columns `item` (external ids)
    and `vector`, from any embedding model, or `backbone` for the hidden states of a pretrained backbone. Items without
    one are initialized from the rest. No vectors if left out."""
    init_vectors_share: float = Field(default=0.5, ge=0, le=1)
    """Share of `item_vectors` in the weight of texts, in squares; the rest is that of words."""
    dim: int | None = Field(default=None, ge=1)
    """Width of user and item embeddings; if left out, that of the backbone, or at most 256 for so many users and items
    that embeddings of the backbone's width would take 48 GiB with their moments. Narrower ones take less memory, less
    communication and less compute in the item softmax. They enter the backbone through a learned matrix and are
    predicted through another one, that of `head.projection`, which they always have (docs/narrow-rows.md)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of user and item embeddings at the input."""
    comm_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of embeddings and their gradients in communication between ranks; `bf16` halves the bytes. Tables, gradient
    sums and the item softmax stay fp32."""
    shard_group: int | None = Field(default=None, ge=1)
    """Number of consecutive ranks that together hold a copy of the tables; all ranks if left out. Lookups and the item
    softmax stay within such a group, so that their memory and traffic stop growing with the number of ranks. In
    return each rank holds more rows, and groups sum their gradients. It must divide the number of ranks, and is for
    training alone (docs/clusters.md#copies-of-the-tables)."""


class HeadConfig(StrictModel):
    """The item softmax. The paper's is `dot` without item bias and residual."""

    similarity: Literal["dot", "cosine"] = "cosine"
    """`dot`: inner product with the tied item embeddings. `cosine`: cosine similarity over a learned temperature."""
    temperature: float = Field(default=0.1, gt=0)
    """Initial temperature of the cosine similarity."""
    item_bias: bool = True
    """Learn a bias for each item."""
    pool_residual: bool = True
    """Add the normalized sum of the item embeddings read so far to the hidden state."""
    projection: bool = False
    """Multiply the hidden state, scaled to unit root mean square, by a learned matrix that starts at zero. So a run
    starts with the scores of the item embeddings read so far, however long the backbone's hidden states are, and learns
    what the language model adds (docs/quality.md). The paper's head has none. Embeddings that are narrower than the
    backbone (`embeddings.dim`) have it in any case."""
    compute_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the factors in the matrix products of the training softmax, for GPUs, where `bf16` is many times as
    fast. Sums, gradients of the item embeddings, tables and predictions stay fp32. On a CPU it saves no time."""
    comm_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the item softmax's queries and of their gradients in communication between ranks; `bf16` halves the
    bytes. Queries are rounded on one rank, too. Gradients are summed in fp32."""
    num_negatives: int = Field(default=0, ge=0)
    """Items sampled for the training softmax of a micro-batch, over all ranks, in addition to its targets; 0: all
    items. Sampling biases the loss downwards and adds gradient noise (docs/performance.md). Predictions are exact."""
    negative_sampling: Literal["uniform", "popularity"] = "uniform"
    """How `num_negatives` items are drawn. `uniform`: with equal probability. `popularity`: in proportion to their
    training interactions, plus one; scores are corrected by the logarithm of the probability (logQ)."""
    new_item_offset: float | None = Field(default=None, allow_inf_nan=False)
    """Item bias of new items, which have a text and no training interactions, relative to the mean of the others: the
    higher, the more places of the lists they take (docs/new-products.md). If left out it is chosen on validation, by
    `validation.max_known_item_loss`, and is -1.5 in a run whose corpus has no new items. Requires `item_bias`."""

    @model_validator(mode="after")
    def _check_requirements(self) -> HeadConfig:
        if self.new_item_offset is not None and not self.item_bias:
            raise ValueError("new_item_offset requires item_bias: without a bias new items are ranked like known ones")
        if self.negative_sampling == "popularity" and not self.num_negatives:
            raise ValueError("negative_sampling=popularity requires num_negatives: without them no item is sampled")
        return self


class MethodConfig(StrictModel):
    """Options of CLLM4Rec that the paper or its code leave open."""

    target: Literal["held_out", "all"] = "held_out"
    """Targets of the multinomial likelihood: the masked items (paper) or all items of the user (the authors' code)."""
    order: Literal["shuffled", "fixed"] = "shuffled"
    """Order of a user's items: shuffled anew in each epoch (paper) or as stored (the authors' code)."""
    mask_ratio: tuple[float, float] = (0.1, 0.9)
    """Fraction of a user's items to mask: a range to draw from uniformly in each epoch, or one fixed number."""
    max_history: int = Field(default=256, ge=1)
    """Most items of a user in a prompt; of more, a random subset (with fixed order the last ones) is used."""
    shared_user_ratio: float = Field(default=0.0, ge=0, le=1)
    """Fraction of prompts over items that are trained with a `<user>` embedding shared by all users instead of the
    user's embedding. Users without an embedding get it in predictions. 0: no shared embedding."""

    @field_validator("mask_ratio", mode="before")
    @classmethod
    def _as_range(cls, value: object) -> object:
        return (value, value) if isinstance(value, float) else value

    @model_validator(mode="after")
    def _check_range(self) -> MethodConfig:
        low, high = self.mask_ratio
        if not 0 < low <= high < 1:
            raise ValueError("mask_ratio must be 0 < low <= high < 1")
        return self

    def num_user_rows(self, num_users: int) -> int:
        """Return the rows of a user table: one for each user and, if used, the shared row after them."""
        return num_users + (self.shared_user_ratio > 0)


_FEWEST_NEIGHBORS = 30
"""Neighbors that `linear.max_entries` leaves in any catalog."""


class LinearConfig(StrictModel):
    """Linear memory: a sparse item-item matrix whose score is added to the LLM's in finetuned runs (docs/linear.md)."""

    neighbors: int = Field(default=300, ge=0)
    """Neighbors by which each item is predicted; 0 leaves the linear memory out. In catalogs of more than 100,000 items
    `max_entries` allows fewer."""
    max_entries: int = Field(default=30_000_000, ge=1)
    """Most neighbors of all items together, which limits time and memory in large catalogs: an item then has
    `max_entries` / items of them, but at least 30."""
    text_weight: float | None = Field(default=None, ge=0, le=1e6)
    """Weight of common words of titles and descriptions relative to common users; 0 ignores texts. Chosen on validation
    if left out."""
    regularization: float | None = Field(default=None, ge=1e-3, le=1e9)
    """L2 weight of the ridge regressions; chosen on validation if left out."""
    history_power: float | None = Field(default=None, ge=0, le=1)
    """Interactions of a user with n of them weigh n^-history_power; 0 weighs all alike. Chosen on validation if left
    out."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of the regressions, which shrinks the weights of frequent neighbors more than those of rare ones; chosen
    on validation if left out."""

    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Weight of the linear score beside the LLM's; chosen by every validation if left out. Without a validation it is
    then 0: set that of another run with the same settings (`linear_weight` in its metrics.jsonl)."""

    def num_neighbors(self, num_items: int) -> int:
        """Neighbors of each item in a catalog of this size."""
        return min(self.neighbors, max(_FEWEST_NEIGHBORS, self.max_entries // num_items))


class BatchConfig(StrictModel):
    """The global batch of an optimizer step, over all ranks."""

    users: int = Field(default=256, ge=1)
    """Users per step."""
    texts: int = Field(default=32, ge=0)
    """Texts per step; 0 leaves out the content LLM."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches into which each rank splits its part of the batch. The result does not depend on it."""


class OptimizerConfig(StrictModel):
    """AdamW for the adapters or the backbone, dense or sparse Adam for the embeddings."""

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of adapters (or of the backbone)."""
    embeddings_lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate of user and item embeddings, of their projection and of the head's parameters. Adam moves an
    entry by about as much in a step, whatever its size: choose it in proportion to the scale of the backbone's word
    embeddings, which new rows have (0.02 in small decoders, 0.14 in SmolLM2; the banner shows the ratio)."""
    words_lr_ratio: float = Field(default=0.0, ge=0)
    """Learning rate, relative to `embeddings_lr`, of updates that items share through the words of their texts: an item
    learns from what items with the same words learn, which helps those with few interactions (docs/shared-words.md).
    0: none are shared. Requires a softmax over all items (`head.num_negatives` of 0)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of adapters; embeddings have their priors instead."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments, each in [0, 1)."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: constant, or decaying to `min_lr_ratio` of the peak at the last step."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate of a decaying schedule, as a fraction of the peak."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps of linear warm-up from zero; at most the steps of the run."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Joint gradient norm of adapters and embeddings above which gradients are clipped."""
    sparse_embedding_updates: bool = True
    """Update only the rows in the batch of tables that are not in the item softmax: users and content items (as
    `torch.optim.SparseAdam`). With `head.num_negatives` also of the items: those in the batch or sampled."""
    embeddings_state: Literal["fp32", "int8", "cpu"] = "fp32"
    """Storage of Adam's moments of user and item embeddings. `fp32`: twice the size of the embeddings. `int8`: a
    quarter of that, quantized by bitsandbytes. `cpu`: fp32 in host memory, with the optimizer step on the CPU; saves
    GPU memory and costs transfers. Checkpoints always contain fp32."""


_MOST_VALIDATED, _VALIDATED_SAMPLE = 100_000, 10_000
"""Most users of a corpus whose validations rank everyone by default, and users of a sample in a larger one."""


class ValidationConfig(StrictModel):
    """Validation during training: ranking of held-out items."""

    every_epochs: int = Field(default=1, ge=0)
    """Epochs between validations; 0 disables validation."""
    metrics: tuple[str, ...] = ("recall@20", "recall@40", "ndcg@100")
    """Metrics to report, recall@K and ndcg@K; the first one selects the best checkpoint."""
    users: int | None = Field(default=None, ge=1)
    """Users of a sample, the same at each validation. If left out: all users with validation items, or 10,000 in a
    corpus of more than 100,000 users."""
    batch_users: int = Field(default=256, ge=1)
    """Users in a batch of each rank."""
    early_stopping_patience: int = Field(default=0, ge=0)
    """Validations without improvement after which training stops; those during the warm-up of the learning rates do not
    count. 0 disables early stopping."""
    max_known_item_loss: float = Field(default=0.03, ge=0, le=1)
    """Largest share of a metric of the known items that new items in the lists may cost. The highest
    `head.new_item_offset` up to 0 that costs no more is chosen; a larger share lists more new items
    (docs/new-products.md)."""

    def sample_size(self, num_users: int) -> int | None:
        """Users of the sample in a corpus of so many users; None for all of them."""
        if self.users is None and num_users > _MOST_VALIDATED:
            return _VALIDATED_SAMPLE
        return self.users


class CheckpointConfig(StrictModel):
    """Saving of checkpoints."""

    dir: str | None = None
    """Folder or fsspec URL (s3://..., gs://...) that all hosts can access; OUTPUT/checkpoints if left out."""
    every_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints; another one is saved at the end."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Minutes between checkpoints, in addition to `every_steps`; not used if left out."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep, in addition to the best one; with `full_every` also as many whole ones."""
    full_every: int = Field(default=1, ge=1)
    """Every how many checkpoints one is whole; the others hold, of each table with sparse updates, only the rows that
    changed since that one, which they need (docs/reliability.md). 1: all are whole. The best one always is."""


class FaultsConfig(StrictModel):
    """Handling of hung ranks and bad steps."""

    collective_timeout_seconds: float = Field(default=600.0, gt=0)
    """Seconds without progress of a rank after which the job ends."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient is not finite, or whose loss spikes: stop and report its batch, or
    skip the update and continue."""
    loss_spike_factor: float = Field(default=10.0, gt=1)
    """A loss above this many times its running mean (and above this many nats) is a spike."""


class RunConfig(StrictModel):
    """One training run: `cllm4rec pretrain` or `cllm4rec finetune`.

    In paths, `~`, `$NAME`, `${NAME}` and `${NAME:-default}` are replaced when a command starts (`preflight.py`).
    """

    renamed_keys: ClassVar[Mapping[str, str]] = RUN_SETTINGS
    file_kind: ClassVar[str | None] = "a run configuration"

    stage: Literal["pretrain", "finetune"]
    """Mutually regularized pretraining or recommendation-oriented finetuning; set by the command."""
    corpus: str
    """Corpus folder or URL, built by `cllm4rec prepare`."""
    backbone: str
    """Folder or hub id of a causal language model of transformers, with the tokenizer of the corpus."""
    output: str
    """Local folder of the run: checkpoints, metrics, TensorBoard, resolved configuration. For checkpoints in an object
    store set `checkpoint.dir`."""
    init_from: str | None = None
    """Run folder or checkpoint with the initial embeddings and adapters of a new run: for finetuning after pretraining,
    or training with another catalog (rows are matched by external id, see docs/running.md)."""
    allow_leak: bool = False
    """Allow an `init_from` that was trained on interactions which this corpus holds out. Evaluations of the run then
    report how many."""
    resume: str = "auto"
    """`auto`: resume from the newest valid checkpoint of this run, if it has one. `none`: start from scratch; refused
    if the run has checkpoints. Otherwise a checkpoint, or a run whose newest checkpoint to resume from."""
    deepspeed: str | None = None
    """DeepSpeed configuration file, such as those in ds_configs/, with "auto" for values that the run sets. The
    package's zero3.json if left out."""
    seed: int = Field(default=0, ge=0)
    """Random seed."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the backbone and its activations. Embeddings and optimizer states are fp32."""
    quantization: Literal["none", "nf4"] = "none"
    """Quantization of the frozen backbone. `nf4`: linear layers in 4 bits (QLoRA, bitsandbytes), computed in
    `precision`."""
    activation_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more compute."""
    epochs: int = Field(default=10, ge=1)
    """Epochs over the users."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many steps, even if `epochs` are not complete."""
    shuffle_window: int = Field(default=64, ge=1)
    """Records shuffled together; more shuffle better and take more memory."""
    log_every: int = Field(default=1, ge=1)
    """Steps between logged metrics."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers of metrics, in addition to OUTPUT/metrics.jsonl: `tensorboard` (OUTPUT/tensorboard), `wandb`, `mlflow`
    (each an extra to install; see docs/monitoring.md). A failing tracker does not end the run."""
    audit: bool = False
    """Record the users and texts that each rank reads at each step, in OUTPUT/audit, so that `cllm4rec audit` can prove
    that each was read exactly once; about 7 bytes per example. OUTPUT must be a folder that all hosts can access."""
    adapter: AdapterConfig = AdapterConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    head: HeadConfig = HeadConfig()
    method: MethodConfig = MethodConfig()
    linear: LinearConfig = LinearConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()

    @model_validator(mode="after")
    def _check_quantization(self) -> RunConfig:
        if self.quantization != "none" and self.adapter.kind == "full":
            raise ValueError("quantization requires a frozen backbone: adapter.kind must be lora or none")
        return self

    @model_validator(mode="after")
    def _check_shared_words(self) -> RunConfig:
        if self.optimizer.words_lr_ratio and self.head.num_negatives:
            raise ValueError(
                "optimizer.words_lr_ratio requires head.num_negatives=0, since words update items that are not sampled:"
                " set one of the two to 0"
            )
        return self


class BackboneConfig(StrictModel):
    """A small decoder to build: `cllm4rec build-backbone`."""

    renamed_keys: ClassVar[Mapping[str, str]] = BACKBONE_SETTINGS
    file_kind: ClassVar[str | None] = "settings of a small backbone"

    family: Literal["gpt2", "llama", "mistral", "qwen2"] = "gpt2"
    """Architecture."""
    hidden_size: int = Field(default=128, ge=8)
    """Hidden size D; an even multiple of `num_heads`."""
    num_layers: int = Field(default=2, ge=1)
    """Number of decoder layers."""
    num_heads: int = Field(default=4, ge=1)
    """Number of attention heads."""
    vocab_size: int = Field(default=4096, ge=300)
    """Largest vocabulary of the tokenizer, which is trained on the texts of the recipe."""
    max_positions: int = Field(default=512, ge=16)
    """Longest sequence in tokens."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of attention and (GPT-2) residual branches."""
    seed: int = Field(default=0, ge=0)
    """Random seed of the weights."""

    @model_validator(mode="after")
    def _check_heads(self) -> BackboneConfig:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError("hidden_size must be an even multiple of num_heads")
        return self
