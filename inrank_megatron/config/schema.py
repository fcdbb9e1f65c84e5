"""The settings of a run, section by section: names, types, ranges, defaults, and one line about each.

Field names are Megatron's where Megatron has one, and unique over the sections, because files and the command
line are flat. Files are read and defaults that depend on other fields are filled in `loading.py`.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from inrank_megatron.fields import (
    Count,
    Fraction,
    Layers,
    NonNegative,
    Positive,
    Section,
    Steps,
    Text,
    Words,
    setting,
)
from inrank_megatron.lowrank.methods.dense import Dense
from inrank_megatron.lowrank.methods.registry import METHODS

if TYPE_CHECKING:
    MethodName = str
    InRankConfig = Any
else:
    from inrank_megatron.lowrank.methods.registry import InRankConfig

    MethodName = Literal[*METHODS]


class ModelConfig(Section):
    """GPT-2: learned positions, LayerNorm, GELU, biases, tied head. LLaMA: RoPE, RMSNorm, SwiGLU."""

    model_preset: (
        Literal[
            "tiny",
            "small",
            "medium",
            "large",
            "llama-60m",
            "llama-130m",
            "llama-250m",
            "llama-350m",
            "llama-1.3b",
            "smollm2-135m",
            "smollm2-360m",
            "tinyllama-1.1b",
            "llama-3.2-1b",
            "qwen2.5-0.5b",
            "mistral-7b",
        ]
        | None
    ) = setting("sizes of a known model; a size that you give yourself replaces the preset's", None)
    model_type: Literal["gpt2", "llama"] = setting(
        "architecture; left out: that of the preset, or else gpt2", "gpt2"
    )
    num_layers: Layers = setting("transformer layers")
    hidden_size: Count = setting("width of the residual stream")
    num_attention_heads: Count = setting("attention heads")
    num_query_groups: Count | None = setting(
        "groups of attention heads that share key and value (LLaMA); left out: num-attention-heads", None
    )
    kv_channels: Count | None = setting(
        "features of an attention head (LLaMA); left out: hidden-size / num-attention-heads", None
    )
    ffn_hidden_size: Count = setting(
        "width inside the MLP; left out: 4 x hidden-size, for LLaMA 8/3 x, rounded up to a multiple of 64"
    )
    seq_length: Count = setting("tokens in one training sequence")
    max_position_embeddings: Count = setting("largest position (GPT-2: learned); left out: seq-length")
    make_vocab_size_divisible_by: Count = setting(
        "the embedding is padded to a multiple of this times the tensor-parallel size", 128
    )
    init_method_std: Positive = setting("standard deviation of the initial weights", 0.02)
    norm_epsilon: Positive = setting("epsilon of the norms", 1e-5)
    openai_gelu: bool = setting("GELU by its tanh approximation, for the public GPT-2 weights", False)
    rotary_base: Positive = setting("base of the angles of RoPE (LLaMA)", 10000.0)
    rope_scaling_factor: Positive | None = setting(
        "Llama 3's scaling of RoPE beyond 8192 positions, by this factor; left out: none", None
    )
    add_qkv_bias: bool = setting("biases on query, key and value alone (LLaMA; Qwen2 has them)", False)
    qk_layernorm: bool = setting("RMSNorm of each head's query and key (LLaMA; Qwen3 has it)", False)
    untie_embeddings_and_output_weights: bool | None = setting(
        "a head apart from the word embedding (LLaMA); left out: LLaMA has one", None
    )
    hidden_dropout: Fraction = setting("dropout on embeddings and on each block's output", 0.0)
    attention_dropout: Fraction = setting("dropout on attention probabilities", 0.0)

    @property
    def query_groups(self) -> int:
        """Groups of attention heads that share key and value."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def head_size(self) -> int:
        """Features of an attention head."""
        return self.hidden_size // self.num_attention_heads if self.kv_channels is None else self.kv_channels

    @property
    def has_own_head(self) -> bool:
        """Whether the output layer is a matrix of its own, apart from the word embedding."""
        chosen = self.untie_embeddings_and_output_weights
        return self.model_type == "llama" if chosen is None else chosen


class ParallelConfig(Section):
    """How the work is divided over the processes."""

    tensor_model_parallel_size: Count | Literal["auto"] = setting(
        "processes over which each layer is sharded; auto: 2 if the processes and the model can be "
        "divided by 2, else 1",
        1,
    )
    sequence_parallel: bool = setting(
        "shard the tokens outside the linears as well (no effect at tensor-parallel size 1)", True
    )
    preflight: bool = setting(
        "compare software, clocks, network, data and folders of all hosts before the run starts", True
    )
    replica_check_interval: Steps = setting(
        "steps between bitwise comparisons of the values that should be equal on several ranks; 0: never", 100
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = setting(
        "what ZeRO shards over the replicas: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too",
        1,
    )
    offload_optimizer: bool = setting(
        "keep the optimizer's state in the host's memory and compute its step there", False
    )
    distributed_timeout_minutes: Annotated[int, Field(ge=1, le=10**6)] = setting(
        "minutes after which a collective fails, and that a process may pause in work that it does for the "
        "first time",
        10,
    )
    hang_timeout_seconds: Annotated[int, Field(ge=5, le=10**6)] = setting(
        "seconds within which all processes end when one is lost, is stopped or hangs", 60
    )


class OptimizerConfig(Section):
    """The optimizer (no decay on biases and norms) and its learning-rate schedule."""

    optimizer: Literal["adamw", "fused-adam", "cpu-adam", "apex-fused-adam", "sgd"] = setting(
        "torch's fused AdamW, DeepSpeed's fused or CPU AdamW, NVIDIA apex's AdamW, or SGD", "adamw"
    )
    factor_optimizer: Literal["adamw", "muon", "spectron", "lora-muon"] = setting(
        "optimizer of U and V: Muon, Spectron, LoRA-Muon, or (adamw) that of all other parameters", "adamw"
    )
    matrix_optimizer: Literal["adamw", "muon"] = setting(
        "optimizer of the weights of all other linears: Muon, or (adamw) that of all other parameters",
        "adamw",
    )
    muon_momentum: Fraction = setting("momentum of Muon, Spectron and LoRA-Muon", 0.95)
    lr: NonNegative = setting("peak learning rate", 6e-4)
    min_lr: NonNegative = setting("learning rate at the end of the decay", 0.0)
    lr_decay_style: Literal["linear", "cosine", "constant"] = setting("shape of the decay", "cosine")
    lr_warmup_iters: Steps = setting("steps of linear warm-up from zero", 0)
    lr_decay_iters: Count | None = setting(
        "step at which the decay ends, warm-up included; left out: train-iters", None
    )
    weight_decay: NonNegative = setting("decoupled weight decay", 0.1)
    adam_beta1: Fraction = setting("decay of the first moment", 0.9)
    adam_beta2: Fraction = setting("decay of the second moment", 0.95)
    adam_eps: Positive = setting("epsilon of Adam", 1e-8)
    sgd_momentum: Fraction = setting("momentum of SGD", 0.9)
    clip_grad: NonNegative = setting("largest global gradient norm; 0: no clipping", 1.0)
    factor_lr_multiplier: Positive = setting(
        "learning rate of U and V, as a multiple of that of all other parameters", 1.0
    )


class TrainingConfig(Section):
    """Method, batch, length, evaluation and saving."""

    method: MethodName = setting("how the factorised linears train", Dense.name)
    micro_batch_size: Count = setting("sequences in one forward pass on one data-parallel rank", 1)
    global_batch_size: Count | None = setting(
        "sequences in one step; left out: micro-batch-size x data-parallel size", None
    )
    train_iters: Count = setting("optimizer steps")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = setting("seed of weights, data order and dropout", 1234)
    bf16: bool = setting("compute in bfloat16, with FP32 master weights", False)
    fp16: bool = setting("compute in float16, with FP32 master weights and dynamic loss scaling", False)
    initial_loss_scale: Positive = setting("first loss scale, a power of two (fp16)", 65536.0)
    loss_scale_window: Count = setting("steps without an overflow before the loss scale doubles (fp16)", 1000)
    hysteresis: Count = setting("overflows before the loss scale halves (fp16)", 2)
    overflow_limit: Count = setting("stop after this number of steps in a row that overflow (fp16)", 30)
    deterministic_mode: bool = setting(
        "make runs repeat bit for bit on GPUs too, with slower attention, embedding gradients and "
        "collectives",
        False,
    )
    eval_interval: Count | None = setting("steps between validations; left out: only at the end", None)
    eval_iters: Count | None = setting("global batches of one validation; left out: the full split", None)
    pretrained_checkpoint: Text | None = setting(
        "model whose weights a new run starts from: folder of a dense run or a checkpoint in it, of a model "
        "or LoRA adapter of Hugging Face, or a name on the hub",
        None,
    )
    pretrained_revision: Text | None = setting(
        "commit of the hub's model to start from; left out: that of the local cache, else the newest", None
    )
    save: Text | None = setting("run folder; left out: a new folder runs/<config>-<method>", None)
    save_interval: Count | None = setting("steps between checkpoints; left out: only at the end", None)
    keep_last: Count | None = setting(
        "keep only this number of newest checkpoints, and the best by validation loss; left out: keep all",
        None,
    )
    use_node_local_storage: bool = setting(
        "--save is a separate folder on each host, with that host's part of every checkpoint", False
    )
    resume: Literal["never", "auto"] | Steps = setting(
        "auto: continue from the newest complete checkpoint in --save; N: from that of step N", "never"
    )
    exit_duration_in_mins: Positive | None = setting("save and stop after this many minutes", None)
    recompute_granularity: Literal["full"] | None = setting(
        "full: recompute each layer's activations in the backward pass", None
    )
    log_interval: Count = setting("steps between two lines of metrics", 1)
    on_loss_spike: Literal["warn", "skip", "rollback"] = setting(
        "after a jump of the loss: warn prints a line; skip also leaves out the update; rollback goes back "
        "to the newest checkpoint and passes over the batches up to the jump",
        "warn",
    )


class DataConfig(Section):
    """Text and tokenizer. Without a source the run reads the English of Python's own documentation."""

    data_path: Words | None = setting(
        "files, folders or patterns: PATH ... as one text, or WEIGHT PATH ... as a blend; divided by --split",
        None,
    )
    train_data_path: Words | None = setting("the same, for training only", None)
    valid_data_path: Words | None = setting("the same, for validation only", None)
    test_data_path: Words | None = setting("the same, for testing only", None)
    split: str = setting("parts of the text for training, validation, test", "969,30,1")
    dataset: Text | None = setting("Hugging Face dataset: OWNER/NAME or OWNER/NAME:CONFIG, or a folder", None)
    tokenizer: Text | None = setting(
        "hub name, or folder with tokenizer.json or vocab.json + merges.txt; left out: train one", None
    )
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)] = setting(
        "tokens of the BPE that is trained when --tokenizer is left out", 4096
    )
    parse_special_tokens: bool = setting(
        "read special tokens written out in the text (such as <|endoftext|>) as those tokens, not as text",
        False,
    )
    data_cache_path: Text = setting("folder of token files", "data_cache")
    text_column: Text = setting("column (parquet, Arrow) or key (JSON) that holds the text", "text")
    document_separator: Text | None = setting(
        "text that ends a document wherever it occurs, such as <|endoftext|>; it is removed, together "
        "with a line end right after it",
        None,
    )


class LoggingConfig(Section):
    """Where rank 0 reports, besides console, TensorBoard and run folder. None of these can end a run."""

    wandb_project: Text | None = setting("Weights & Biases: the project; left out: no W&B", None)
    wandb_exp_name: Text | None = setting("name of the run there; left out: that of the run folder", None)
    wandb_save_dir: Text | None = setting("folder of W&B's local files; left out: the run folder", None)
    mlflow_experiment: Text | None = setting("MLflow: the experiment; left out: no MLflow", None)
    mlflow_run_name: Text | None = setting("name of the run there; left out: that of the run folder", None)
    mlflow_tracking_uri: Text | None = setting(
        "server or store; left out: MLFLOW_TRACKING_URI, else MLflow's default", None
    )
    prometheus_port: Annotated[int, Field(ge=1, le=65535)] | None = setting(
        "port of rank 0's host for Prometheus to scrape; left out: none", None
    )


class Config(Section):
    """One run. Build it with `from_flat` or `load`."""

    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    inrank: InRankConfig
    data: DataConfig
    logging: LoggingConfig

    @property
    def decay_iters(self) -> int:
        """The step at which the learning rate's decay ends."""
        chosen = self.optimizer.lr_decay_iters
        return self.training.train_iters if chosen is None else chosen
