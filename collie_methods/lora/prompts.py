"""Prompt tuning and p-tuning: the embeddings of virtual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collie_core.plugin import CheckpointError, ConfigError, Piece, UserError, adapt_embedding
from collie_methods.lora.files import base_model, read_folder, write_folder
from collie_methods.lora.prompt_plugins import PromptTuningOptions, PTuningOptions
from collie_methods.lora.values import generator

if TYPE_CHECKING:
    from collie_core.run import Run
    from collie_core.shard import Shard

EMBEDDINGS = "prompt_embeddings"  # in peft's files
_LINEARS = (0, 2, 4)  # of the encoder, activations between them, by peft's names


class Prompts(nn.Module):
    """Vectors of the virtual tokens: (P, E), or what the encoder, of width `hidden`, makes of them."""

    def __init__(self, count: int, like: Tensor, hidden: int | None) -> None:
        super().__init__()
        width, how = like.shape[1], {"device": like.device, "dtype": like.dtype}
        self.embedding = nn.Parameter(torch.empty(count, width, device=like.device, dtype=like.dtype))
        sizes = [] if hidden is None else [(width, hidden), (hidden, hidden), (hidden, width)]
        layers: list[nn.Module] = []
        for inputs, outputs in sizes:
            layers += [nn.ReLU()] if layers else []
            layers.append(nn.Linear(inputs, outputs, **how))  # type: ignore[arg-type]
        self.mlp_head = nn.Sequential(*layers)

    def forward(self, ids: Tensor, vectors: Tensor) -> Tensor:
        """vectors (B, S, E), with those of the virtual tokens (negative ids) in their places."""
        prompts = self.mlp_head(self.embedding)
        own = F.embedding((-1 - ids).clamp(min=0), prompts)
        return torch.where((ids < 0).unsqueeze(-1), own, vectors)


def encoded(embedding: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """What `Prompts` makes of whole tensors: linears (weight, bias) with ReLU between them; fp32."""
    out = embedding.float()
    for index, (weight, bias) in enumerate(layers):
        out = F.linear(out.relu() if index else out, weight.float(), bias.float())
    return out


class PromptAdapter:
    """One entry of `adapters:`, prompt_tuning or p_tuning; see `collie_core.hookspecs.Adapter`."""

    def __init__(self, options: PromptTuningOptions | PTuningOptions, run: Run) -> None:
        self.options, self.run, self.name = options, run, options.adapter_name
        self._read: Tensor | None = None
        if options.path is not None:
            self.load(Path(options.path))

    # ------------------------------------------------------------ on the model
    def adapt(self, model: nn.Module) -> None:
        """A child of the token embedding.  Raises ConfigError where the model's plan names none."""
        self._words = words = word_embedding(self.run)
        embedding = model.get_submodule(words)
        if not isinstance(embedding, nn.Embedding):
            raise ConfigError(f"{words} is a {type(embedding).__name__}, which adapters cannot change")
        hidden = None
        if isinstance(self.options, PTuningOptions) and self._read is None:
            hidden = self.options.encoder_hidden_size or embedding.embedding_dim
        count = self.options.num_virtual_tokens if self._read is None else len(self._read)
        adapt_embedding(model, words, self.name, Prompts(count, embedding.weight, hidden))
        model.virtual_tokens = count  # type: ignore[assignment]

    def initialise(self, name: str, values: Tensor, shard: Shard) -> None:
        """From the folder of `path`, or anew."""
        leaf = name.partition(f".adapters.{self.name}.")[2]
        if self._read is None:
            whole = self._first(name, leaf, shard.shape)
        elif tuple(self._read.shape) == shard.shape:
            whole = self._read
        else:
            raise CheckpointError(
                f"{self.options.path}: {EMBEDDINGS} has shape {list(self._read.shape)}, the model asks for "
                f"{list(shard.shape)}"
            )
        values.copy_(whole[Piece(values, shard.shape, shard.offsets).slices])

    def _first(self, name: str, leaf: str, shape: tuple[int, ...]) -> Tensor:
        random = generator(self.run.seed, name)
        if isinstance(self.options, PTuningOptions):
            if leaf == "embedding":
                return torch.randn(shape, generator=random)
            weight = self.run.shards[f"{name.removesuffix('.bias').removesuffix('.weight')}.weight"]
            bound = weight.shape[1] ** -0.5  # as torch's linears
            return torch.empty(shape).uniform_(-bound, bound, generator=random)
        if self.options.prompt_tuning_init == "random":
            return torch.randn(shape, generator=random) * 0.02
        words = self.run.shards[f"{self._words}.weight"].gathered()
        if self.options.prompt_tuning_init == "text":
            text = self.options.prompt_tuning_init_text
            ids = self.run.tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise ConfigError("prompt_tuning_init_text: the tokenizer makes no token of it")
            chosen = torch.tensor((list(ids) * shape[0])[: shape[0]])
        else:
            chosen = torch.randint(len(words), (shape[0],), generator=random)
        return words[chosen.to(words.device)]

    def merge(self, model: nn.Module) -> None:
        """Raises UserError: no weights can hold virtual tokens."""
        raise UserError(f"adapter {self.name!r}: virtual tokens cannot be merged into weights")

    # ------------------------------------------------------------ in files
    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """peft's layout: the vectors, an encoder's being computed, as peft itself does."""
        from peft import PromptEncoderConfig, PromptTuningConfig

        own = f"{self._words}.adapters.{self.name}."
        found = {name.removeprefix(own): tensor for name, tensor in tensors.items()}
        embedding = found.pop("embedding")
        layers = [(found[f"mlp_head.{n}.weight"], found[f"mlp_head.{n}.bias"]) for n in _LINEARS if found]
        vectors = encoded(embedding, layers).to(embedding.dtype)
        count, width = vectors.shape
        how: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model(self.run.config.model.path),
            "inference_mode": True,
            "num_virtual_tokens": count,
            "token_dim": width,
            "num_transformer_submodules": 1,
        }
        if isinstance(self.options, PTuningOptions):
            hidden = layers[0][0].shape[0] if layers else width
            config: Any = PromptEncoderConfig(encoder_hidden_size=hidden, **how)
        else:
            config = PromptTuningConfig(prompt_tuning_init="RANDOM", **how)
        write_folder(folder, config, {EMBEDDINGS: vectors})

    def load(self, folder: Path) -> None:
        """The vectors of a folder in peft's layout.  Raises CheckpointError."""
        from peft import PromptEncoderConfig, PromptTuningConfig

        p_tuning = isinstance(self.options, PTuningOptions)
        self._read = read_embeddings(folder, PromptEncoderConfig if p_tuning else PromptTuningConfig)[1]


def word_embedding(run: Run) -> str:
    """Path of the model's token embedding.  Raises ConfigError where its parallel plan names none."""
    source = run.source
    assert source is not None
    names = source.provider.parallel_plan(source.config).embedding
    if len(names) != 1 or "*" in names[0]:
        raise ConfigError(f"the parallel plan of model plugin {source.name} names no single embedding")
    return names[0].removesuffix(".weight")


def read_embeddings(folder: Path, kind: type) -> tuple[Any, Tensor]:
    """The config and `prompt_embeddings` of a folder.  Raises CheckpointError."""
    config, tensors = read_folder(folder, kind)
    found = tensors.pop(EMBEDDINGS, None)
    if found is None or tensors or found.ndim != 2 or len(found) != config.num_virtual_tokens:
        raise CheckpointError(
            f"{folder}: expected the one tensor {EMBEDDINGS} with {config.num_virtual_tokens} rows"
        )
    return config, found
