"""What one replica is: the model, the engine's settings, and the machine it gets."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from shoal.api.base import PATH_PATTERN, ApiModel, ModelId, Quantity, Unique, Uri


class Dtype(StrEnum):
    """The number format of weights and activations."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Quantization(StrEnum):
    """Quantization at load time."""

    AUTO = "auto"
    NONE = "none"
    INT8 = "int8"
    FP8 = "fp8"


class KvCacheDtype(StrEnum):
    """The number format of the KV cache."""

    AUTO = "auto"
    FP8 = "fp8"
    INT8 = "int8"


class SpeculativeMethod(StrEnum):
    """Where drafted tokens come from."""

    NGRAM = "ngram"
    DRAFT = "draft"


class ExecutorKind(StrEnum):
    """What runs the ranks of a replica."""

    AUTO = "auto"
    RAY = "ray"


class CacheType(StrEnum):
    """Where downloaded models are kept."""

    NONE = "None"
    HOST_PATH = "HostPath"
    PVC = "PVC"


class Adapter(ApiModel):
    """A LoRA adapter, served as a model id of its own."""

    name: ModelId = Field(description="Model id under which clients ask for the adapter.")
    uri: Uri = Field(description="Where the adapter lies; the same schemes as spec.model.uri.")
    revision: str | None = Field(
        default=None, max_length=256, description="Revision of the adapter at its source."
    )


class ModelSpec(ApiModel):
    """The model, and the names under which clients ask for it."""

    uri: Uri = Field(
        description="Where the model lies: hf://org/name, s3://, gs://, https://, oci://, "
        "pvc://claim/path, file:///path, or py://package for a file shipped in a Python package."
    )
    revision: str | None = Field(
        default=None,
        max_length=256,
        description="Branch, tag or commit for hf://, version for py://; a file has none. "
        "Default: the source's newest.",
    )
    name: ModelId | None = Field(
        default=None, description="OpenAI model id. Default: metadata.name."
    )
    aliases: Annotated[tuple[ModelId, ...], Field(max_length=16), Unique()] = Field(
        default=(),
        description="More model ids for the same service.",
    )
    adapters: Annotated[tuple[Adapter, ...], Field(max_length=64), Unique("name")] = Field(
        default=(),
        description="LoRA adapters, each served as a model id of its own.",
    )


class SpeculativeSpec(ApiModel):
    """Speculative decoding: several drafted tokens are checked in one step."""

    method: SpeculativeMethod = Field(
        description="ngram drafts from the request's own tokens; draft uses a smaller model."
    )
    tokens: int = Field(default=4, ge=1, le=16, description="Tokens drafted per step, at most.")
    draft_model: Uri | None = Field(
        default=None, description="Where the draft model lies; with method draft only."
    )


class EngineSpec(ApiModel):
    """The engine's settings. Every key is also a flag of `shoal serve`."""

    max_model_len: int | None = Field(
        default=None,
        ge=2,
        le=16_777_216,
        description="Prompt and generated tokens of one request together, at most. "
        "Default: what the model was trained for, at most 8192.",
    )
    max_num_seqs: int = Field(
        default=256, ge=1, le=4096, description="Sequences that run at the same time, at most."
    )
    max_batched_tokens: int = Field(
        default=2048, ge=1, le=1_048_576, description="Tokens computed in one step, at most."
    )
    max_prefill_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1_048_576,
        description="Prompt tokens of one request computed in one step, at most. "
        "Default: half of maxBatchedTokens.",
    )
    block_size: Literal[8, 16, 32, 64, 128] = Field(
        default=16, description="Tokens of one KV cache block."
    )
    kv_cache_memory_fraction: float = Field(
        default=0.9,
        gt=0,
        le=1.0,
        description="Share of its room that the KV cache takes. The room is what resources.memory "
        "leaves beside everything else; without resources.memory, what the machine has available "
        "beside everything else, at most 4 GiB.",
    )
    kv_cache_blocks: int | None = Field(
        default=None,
        ge=2,
        le=16_777_216,
        description="Number of KV cache blocks; kvCacheMemoryFraction has no effect beside it. "
        "Default: as many as kvCacheMemoryFraction has room for. Never more than maxNumSeqs "
        "sequences of maxModelLen tokens need.",
    )
    enable_prefix_caching: bool = Field(
        default=True, description="Keep computed KV blocks and reuse them for equal prefixes."
    )
    dtype: Dtype = Field(
        default=Dtype.AUTO,
        description="Number format of weights and activations. "
        "auto: the fastest that the machine computes well.",
    )
    quantization: Quantization = Field(
        default=Quantization.AUTO,
        description="Quantization at load time. auto: as the checkpoint is "
        "(GPTQ, AWQ, compressed-tensors and GGUF are recognised).",
    )
    kv_cache_dtype: KvCacheDtype = Field(
        default=KvCacheDtype.AUTO, description="Number format of the KV cache. auto: the model's."
    )
    speculative: SpeculativeSpec | None = Field(
        default=None, description="Speculative decoding. Default: off."
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Threads of the CPU backend. Default: the cores that the process may use.",
    )
    deterministic: bool = Field(
        default=False,
        description="Equal requests give bit-equal tokens and logprobs, whatever runs beside them.",
    )


class ParallelismSpec(ApiModel):
    """How a replica's ranks share the model; tensor x pipeline of them."""

    tensor: int = Field(default=1, ge=1, le=1024, description="Ranks that share every layer.")
    pipeline: int = Field(default=1, ge=1, le=1024, description="Stages of consecutive layers.")
    executor: ExecutorKind = Field(
        default=ExecutorKind.AUTO,
        description="auto: in process for one rank, processes on one host, Ray beyond.",
    )


class ResourcesSpec(ApiModel):
    """What each pod of a replica gets."""

    gpus_per_node: int = Field(
        default=0, ge=0, le=64, description="GPUs of each pod, one rank each; 0 computes on CPUs."
    )
    gpu_resource: str = Field(
        default="nvidia.com/gpu",
        pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$",
        max_length=128,
        description="Kubernetes resource name by which GPUs are asked for.",
    )
    cpu: Quantity | None = Field(
        default=None, description='CPU cores of each pod, such as "8" or 500m.'
    )
    memory: Quantity | None = Field(
        default=None,
        description="Memory limit of each pod, such as 64Gi. On CPUs the KV cache counts.",
    )
    shm: Quantity | None = Field(
        default=None, description="Size of /dev/shm of each pod. Default: the container runtime's."
    )


class CostSpec(ApiModel):
    """Prices, from which metrics and status tell the cost of a million tokens."""

    per_gpu_hour: float = Field(ge=0, le=1_000_000, description="Price of one GPU for one hour.")
    currency: str = Field(
        default="USD",
        pattern=r"^[A-Z]{3}$",
        description="ISO 4217 code of the currency, such as USD.",
    )


class CacheSpec(ApiModel):
    """Where downloaded models are kept from one pod to the next."""

    type: CacheType = Field(
        default=CacheType.NONE,
        description="None: in the pod. HostPath: a folder of the node. PVC: a volume claim.",
    )
    claim_name: str | None = Field(
        default=None,
        max_length=253,
        pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$",
        description="Name of the PersistentVolumeClaim; with type PVC only.",
    )
    path: str | None = Field(
        default=None,
        max_length=1024,
        pattern=PATH_PATTERN,
        description="Absolute folder on the node; with type HostPath only.",
    )
