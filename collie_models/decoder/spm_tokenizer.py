"""Fast tokenizers, with character offsets, from a sentencepiece BPE model (`tokenizer.model`).

transformers' own conversions differ from sentencepiece where a text begins with a space, has runs of
spaces, or follows a special token; these give the ids of the original (slow) tokenizers.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_core.files import read_json_object
from collie_core.plugin import CheckpointError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

_SPACE = "▁"
_BPE, _USER_DEFINED, _NORMAL = 2, 4, 1  # of sentencepiece's ModelProto
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
#: a way to end or begin a text, and a pair of texts, with special tokens: see `fast_tokenizer`
Around = tuple[list[str], list[str]]


def read_sentencepiece(path: Path) -> Any:
    """The ModelProto in a file.  Raises CheckpointError for a file that is none, or is no BPE model."""
    generated: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # untyped
    proto = generated.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, or OSError
        raise CheckpointError(f"{path}: is no sentencepiece model: {error}") from None
    if not proto.pieces or proto.trainer_spec.model_type != _BPE:
        raise CheckpointError(f"{path}: is no sentencepiece model of type BPE")
    return proto


def backend_tokenizer(
    proto: Any, legacy: bool = True, names: Mapping[int, str] | None = None, silent: Sequence[str] = ()
) -> Tokenizer:
    """A `tokenizers.Tokenizer` with the ids of the sentencepiece model.

    legacy: every piece of text between special tokens gets the dummy prefix; else only the first does.
    names: other names for some ids, or names for ids after the model's, which no text is split into.
    silent: tokens that are nothing in decoded text, which then loses its dummy prefix alone.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    spec = proto.normalizer_spec
    pieces = {index: piece.piece for index, piece in enumerate(proto.pieces)} | dict(names or {})
    vocab = {piece: index for index, piece in pieces.items()}
    bpe = models.BPE(
        vocab=vocab,
        merges=_merges(proto, vocab),
        unk_token=proto.trainer_spec.unk_piece or "<unk>",
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    tokenizer = Tokenizer(bpe)
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        charsmap = normalizers.Precompiled(spec.precompiled_charsmap)
        if charsmap.normalize_str("\r") == charsmap.normalize_str("\n"):
            steps.append(normalizers.Replace("\r\n", "\n\n"))  # it would take the two as one character
        steps.append(charsmap)
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("\\A "), "")]
    if spec.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(f"{_SPACE}+\\z"), ""))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if spec.add_dummy_prefix and not legacy:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    unheard = [decoders.Replace(Regex("\\A" + re.escape(token) + "\\z"), "") for token in silent]
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*unheard, *steps, *_strip(proto, legacy and not silent)])
    user_defined = [
        piece.piece
        for index, piece in enumerate(proto.pieces)
        if piece.type == _USER_DEFINED and pieces[index] == piece.piece
    ]
    # sentencepiece looks for them in the normalised text, where no space is left; a dummy prefix would
    # become part of what is looked for
    tokenizer.add_tokens(
        [
            AddedToken(piece, normalized=not spec.add_dummy_prefix)
            for piece in user_defined
            if " " not in piece
        ]
    )
    return tokenizer


def renamed_pieces(folder: Path, settings: Mapping[str, Any], proto: Any) -> dict[int, str]:
    """Pieces of the sentencepiece model that the folder's files give another name, such as unused ones."""
    stated = list((settings.get("added_tokens_decoder") or {}).items())
    stated += [(t["id"], t) for t in read_json(folder / "tokenizer.json").get("added_tokens") or []]
    names = {int(index): token["content"] for index, token in stated if int(index) < len(proto.pieces)}
    return {index: name for index, name in names.items() if name != proto.pieces[index].piece}


def _merges(proto: Any, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, best piece first, as sentencepiece merges them."""
    found = []
    for piece in proto.pieces:
        if piece.type == _NORMAL:
            text = piece.piece
            pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
            pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
            pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
            found += [(-piece.score, pair) for pair in pairs]
    found.sort(key=lambda item: item[0])
    return [pair for _, pair in found]


def _strip(proto: Any, legacy: bool) -> list[Any]:
    """What undoes the dummy prefix in decoding, the legacy tokenizer's oddities included.

    It drops up to two spaces where no special token is kept, else the one after the last special token.
    """
    from tokenizers import Regex, decoders

    if not proto.normalizer_spec.add_dummy_prefix:
        return []
    if not legacy:
        return [decoders.Strip(" ", 1, 0)]
    spec = proto.trainer_spec
    tokens = (spec.bos_piece or "<s>", spec.eos_piece or "</s>", spec.unk_piece or "<unk>")
    special = "|".join(re.escape(token) for token in tokens)
    none_after = f"(?![\\s\\S]*(?:{special}))"
    return [
        decoders.Replace(Regex(f"\\A {{1,2}}{none_after}"), ""),
        decoders.Replace(Regex(f"(?<={special}) {none_after}"), ""),
    ]


def fast_tokenizer(
    folder: Path,
    backend: Tokenizer,
    settings: Mapping[str, Any],
    padding_side: str = "left",
    pair: Around | None = None,
    cls: type[PreTrainedTokenizerFast] | None = None,
    **options: Any,
) -> PreTrainedTokenizerFast:
    """The backend with transformers' interface, special and added tokens, and chat template of the folder.

    settings: the contents of tokenizer_config.json.  pair: tokens between and after the two texts of a pair;
    None: each is treated like a single text.  cls: made with these options; None: the stock class.
    """
    from transformers import PreTrainedTokenizerFast

    add_tokens(folder, backend, settings)
    named = {key: token_text(settings.get(key)) for key in NAMED}
    bos, eos = named["bos_token"], named["eos_token"]
    before = [bos] if bos and settings.get("add_bos_token", True) else []
    after = [eos] if eos and settings.get("add_eos_token", False) else []
    if pair is None:
        pair = ([*after, *before], after)
    backend.post_processor = surround(backend, before, after, pair)
    others = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    known = {token: value for token, value in named.items() if value is not None}
    tokenizer = (cls or PreTrainedTokenizerFast)(
        tokenizer_object=backend,
        **known,
        **options,
        extra_special_tokens=[token_text(token) for token in others],
        model_max_length=settings.get("model_max_length") or int(1e30),
        padding_side=settings.get("padding_side") or padding_side,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template(folder, settings)
    tokenizer.name_or_path = str(folder)
    return tokenizer


def surround(backend: Tokenizer, before: list[str], after: list[str], pair: Around) -> Any:
    """A post-processor that puts tokens around single texts, and between and after the texts of a pair."""
    from tokenizers import processors

    between, end = pair
    names = dict.fromkeys([*before, *after, *between, *end])
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *between, *(f"{token}:1" for token in ["$B", *end])],
        special_tokens=[(name, backend.token_to_id(name)) for name in names],
    )


def token_text(token: Any) -> str | None:
    """The text of a token that a config gives as text or as an AddedToken's fields; None for none."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token or None


def chat_template(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template (Jinja) of a tokenizer folder."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        default = path.read_text(encoding="utf-8")
        named = {other.stem: other.read_text(encoding="utf-8") for other in others}
        return {"default": default, **named} if named else default
    stated = settings.get("chat_template")
    if isinstance(stated, list):
        return {entry["name"]: entry["template"] for entry in stated}
    return stated


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file, empty where there is no file.  Raises CheckpointError for a damaged one."""
    return read_json_object(path) if path.is_file() else {}


def add_tokens(folder: Path, backend: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Tokens beyond the sentencepiece model, under the ids that the folder's files give them."""
    from tokenizers import AddedToken

    tokens: dict[int, AddedToken] = {
        int(index): AddedToken(text, normalized=False)
        for text, index in read_json(folder / "added_tokens.json").items()
    }
    stated = [(index, token) for index, token in (settings.get("added_tokens_decoder") or {}).items()]
    stated += [(t["id"], t) for t in read_json(folder / "tokenizer.json").get("added_tokens") or []]
    known = backend.get_added_tokens_decoder()  # the sentencepiece model's own
    for index, token in stated:
        if not token.get("special") and int(index) in known:
            continue
        flags = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "special") if key in token}
        # matched in the raw text, so that each piece between them is normalised by itself
        tokens[int(index)] = AddedToken(token["content"], normalized=False, **flags)
    for index in sorted(tokens):
        token = tokens[index]
        if token.special:
            backend.add_special_tokens([token])
        else:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise CheckpointError(
                f"{folder}: added token {token.content!r} has id {index} in the tokenizer's files, but would "
                f"get {backend.token_to_id(token.content)} after the sentencepiece model"
            )
