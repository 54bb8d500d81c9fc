"""The configuration, as typed models: the same names in YAML, on the command line and in Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from collie_core.config.document import Document, Key
from collie_core.config.problems import ConfigProblems, from_pydantic

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the config: unknown keys and wrong types are refused, on assignment too."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_assignment=True,
        validate_default=True,
        protected_namespaces=(),
    )

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign a validated value.  Raises ConfigError for an unknown name or a wrong value."""
        if name.startswith("_"):
            return super().__setattr__(name, value)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise from_pydantic(error, type(self).model_json_schema(), {name: value}) from None


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _path_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


Text = Annotated[str, BeforeValidator(_path_text)]


class PluginSection(Section):
    """A plugin chosen by name (`name` alone or `{name: name, option: value}`); `options` are the plugin's."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the plugin."""
        return dict(self.model_extra or {})


class ModelSection(Section):
    """Which checkpoint to load and how."""

    path: Annotated[Text, Field(description="folder in Hugging Face layout, or hub id")]
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    provider: str | None = Field(
        default=None, description="model plugin; null: chosen by the checkpoint's model_type"
    )
    revision: str | None = None


class ParameterGroupSection(Section):
    """Parameters (by patterns such as `*.bias`) with their own learning rate or weight decay."""

    params: list[str]
    lr: Annotated[float, Field(ge=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("params"), str):
            return {**value, "params": [value["params"]]}
        return value


class OptimizerSection(PluginSection):
    """The optimizer and the keys that the core gives every optimizer; null means the plugin's default."""

    name: str = "adamw"
    lr: Annotated[float, Field(gt=0)] | None = None
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    clip_grad_value: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    param_groups: list[ParameterGroupSection] = Field(default_factory=list)


class LayoutSection(PluginSection):
    """Where the model lives; the options are the layout's own."""

    name: str = "native"


class ScheduleSection(Section):
    """Learning rate over the steps: warm-up from 0, then the named shape, down to `min_ratio` of lr."""

    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_ratio: Fraction = 0.0
    min_ratio: Fraction = 0.0
    decay_ratio: Fraction = Field(default=0.1, description="wsd: the part of the steps in the final decay")


class SourceSection(Section):
    """One data source of several; `weight` is its share of the records drawn in an epoch."""

    path: Text
    weight: Annotated[float, Field(gt=0)] | None = None


def _sources(value: Any) -> Any:
    if value is None:
        return value
    items = value if isinstance(value, list | tuple) else [value]
    return [{"path": str(item)} if isinstance(item, str | Path) else item for item in items]


Sources = Annotated[list[SourceSection], BeforeValidator(_sources)]


class DataSection(Section):
    """Records: where they are and how they become rows of tokens."""

    train: Sources | None = Field(default=None, description="a path, or a list of paths or of {path, weight}")
    eval: Sources | None = Field(default=None, description="as train; null: nothing is evaluated")
    max_length: Annotated[int, Field(ge=2)] = 2048
    packing: bool = False
    template: Text | None = Field(
        default=None, description="name of a template, or a file with a Jinja chat template"
    )
    on_bad_record: Literal["stop", "skip"] = "stop"


class TrainSection(Section):
    """The training loop."""

    micro_batch_size: Count = 1
    gradient_accumulation_steps: Count | None = Field(
        default=None, description="null: 1, or derived from global_batch_size"
    )
    global_batch_size: Count | None = None
    epochs: Count = 1
    max_steps: Count | None = Field(default=None, description="end after so many steps, even within an epoch")
    activation_checkpointing: (
        Auto | Literal["none", "full", "selective", "offload"] | Annotated[int, Field(ge=0)]
    ) = Field(
        default="auto",
        description="blocks computed again in the backward pass: all (full), the first so many, all but "
        "their attention (selective), all from inputs in host memory (offload); auto: as few as fit",
    )
    compile: Auto | bool = "auto"
    trainable: list[str] = Field(
        default_factory=list, description="patterns of the parameters to train; empty: all"
    )
    frozen: list[str] = Field(default_factory=list, description="patterns of parameters to leave as they are")
    on_nan: Literal["stop", "skip"] = "stop"
    deterministic: bool = False
    stop_grace: Annotated[float, Field(gt=0)] = Field(
        default=600.0, description="seconds a stopped run has to save"
    )


class EvaluateSection(Section):
    """Evaluation during and after training."""

    every_steps: Count | None = None
    micro_batch_size: Count | None = Field(default=None, description="null: train.micro_batch_size")
    evaluators: list[Annotated[PluginSection, BeforeValidator(_named)]] = Field(
        default_factory=lambda: [PluginSection(name="perplexity")]
    )


class CheckpointSection(Section):
    """When checkpoints are written, and how they are read."""

    every_steps: Count | None = None
    keep: Count = 2
    resume: str = Field(default="auto", description="auto | never | path of a checkpoint")
    async_save: bool = False
    verify: Literal["full", "size"] = "full"


class OpsSection(Section):
    """Which implementation of an operation is used; auto takes the fastest that is there."""

    attention: str = Field(
        default="auto",
        description="sdpa, sdpa_without_flash, cudnn, flash, varlen, flash_attn, flash_attn_4, flex or "
        "reference",
    )
    cross_entropy: str = Field(default="auto", description="chunked, plain, liger")


class CollieConfig(Section):
    """A whole run.  Fields are the keys of the YAML file; assignment is validated.

    Raises ConfigError for unknown keys and wrong values, all of them in one message.
    """

    _document: Document | None = PrivateAttr(None)

    model: ModelSection
    use_flash: Auto | bool = "auto"
    dp_size: Count = Field(default=1, description="data parallel; dp * tp * pp = number of processes")
    tp_size: Count = Field(default=1, description="tensor parallel")
    pp_size: Count = Field(default=1, description="pipeline parallel")
    layout: Annotated[LayoutSection, BeforeValidator(_named)] = Field(default_factory=lambda: LayoutSection())
    optimizer: Annotated[OptimizerSection, BeforeValidator(_named)] = Field(
        default_factory=lambda: OptimizerSection()
    )
    schedule: Annotated[ScheduleSection, BeforeValidator(_named)] = Field(
        default_factory=lambda: ScheduleSection()
    )
    adapters: list[Annotated[PluginSection, BeforeValidator(_named)]] = Field(default_factory=list)
    data: DataSection = Field(default_factory=lambda: DataSection())
    train: TrainSection = Field(default_factory=lambda: TrainSection())
    evaluate: EvaluateSection = Field(default_factory=lambda: EvaluateSection())
    checkpoint: CheckpointSection = Field(default_factory=lambda: CheckpointSection())
    monitors: list[Annotated[PluginSection, BeforeValidator(_named)]] = Field(
        default_factory=lambda: [PluginSection(name="console")]
    )
    plugins: list[Annotated[PluginSection, BeforeValidator(_named)]] = Field(
        default_factory=list, description="plugins of the group collie.plugins, which only listen"
    )
    ops: OpsSection = Field(default_factory=lambda: OpsSection())
    output_dir: Text = "runs/run"
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 42

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise from_pydantic(error, type(self).model_json_schema(), values) from None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> CollieConfig:
        """The config in a YAML file, changed by overrides such as `train.epochs=2`.

        Raises ConfigError naming file, line, key and the nearest known key.
        """
        from collie_core.config.load import load_config

        return load_config(path, overrides)

    @classmethod
    def from_pretrained(cls, path: str | Path, **fields: Any) -> CollieConfig:
        """A config for the checkpoint at `path` (folder or hub id); `fields` are keys of the YAML."""
        model = {**fields.pop("model", {}), "path": str(path)}
        return cls(model=model, **fields)

    def locate(self, path: Key) -> str:
        """Where a key was written, such as `train.yaml:8`, or "" for a config made in Python."""
        return self._document.locate(path) if self._document else ""

    def problems(self, found: ConfigProblems) -> ConfigProblems:
        """The same problems with the file and line of each."""
        return ConfigProblems(found.problems, self._document.locate) if self._document else found

    def to_mapping(self) -> dict[str, Any]:
        """Every key with its value, as plain data that YAML and JSON can hold."""
        return self.model_dump(mode="json")
