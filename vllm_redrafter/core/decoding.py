"""ReDrafter over any Hugging Face causal LM, one prompt at a time: the reference loop, written to be read.

    read     the prompt; the target chooses the first token, the root
    draft    a beam search from the target's last hidden state and the root, its best N continuations as a tree
    verify   one forward of the target over root and nodes, each seeing the context and its own ancestors
    accept   walk down the tree with the tokens that the target draws
    commit   keep keys and values of the accepted path and the hidden state at its end; the last token is the next root

Every token is drawn by the target, so the text is the one that `autoregressive` gives with the same sampler; only the
number of forwards differs. Nothing here is tuned: the cache is copied at every step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vllm_redrafter.core import acceptance, beam_search, layers, token_tree
from vllm_redrafter.core.beam_search import SHARPNESS, BeamShape, Foresight
from vllm_redrafter.core.drafter import Embed, ReDrafter
from vllm_redrafter.core.noise import NoisySampler
from vllm_redrafter.core.token_tree import TokenTree

Sample = Callable[[torch.Tensor], torch.Tensor]
"""Draws one token per row of logits: [rows, vocab] -> [rows]; a generator, if it needs one, is its own."""


class Generation(NamedTuple):
    """The tokens generated, and how each forward after the prompt's contributed to them."""

    token_ids: list[int]
    """Without the prompt; the end-of-sequence token, if one came, is the last."""
    paths: list[list[int]]
    """The tree's nodes that each verification accepted, root excluded; a stop may have cut their tokens off."""

    @property
    def num_steps(self) -> int:
        """Number of verifications."""
        return len(self.paths)

    @property
    def num_accepted(self) -> list[int]:
        """Drafts accepted by each verification."""
        return [len(path) for path in self.paths]

    @property
    def mean_acceptance_length(self) -> float:
        """Mean tokens per verification: the accepted drafts and one more."""
        return 1 + sum(self.num_accepted) / max(1, self.num_steps)


class Seen(NamedTuple):
    """What the target makes of the tokens that it was shown."""

    hidden: torch.Tensor  # [tokens, input_size]: of the head, so after the final norm, then what left fused layers
    logits: torch.Tensor  # [tokens, vocab]: of the token that comes next


class Target:
    """A causal LM with its cache: reads tokens, looks at a tree of continuations, and keeps one path of it.

    Args:
        max_length: tokens that the cache will ever hold.
        fused_layers: layers whose outputs the drafter sees besides the last hidden state.

    Raises:
        ValueError: the model has no such layer.
        NotImplementedError: the model keeps more than the keys and values of every token.
    """

    def __init__(self, model: PreTrainedModel, max_length: int, fused_layers: Sequence[int] | None = None) -> None:
        _check_supported(model, max_length)
        self.model = model
        self.fused_layers = fused_layers
        # the table's own rows: some models' embedding modules scale what they return, and serving engines do not
        embedding: Any = model.get_input_embeddings()
        self.embed: Embed = lambda token_ids: functional.embedding(token_ids, embedding.weight)
        self.head: Any = model.get_output_embeddings()
        # without the config every layer keeps all tokens: sliding layers could not forget the rejected ones
        self.cache = DynamicCache()
        self.num_cached = 0
        self.max_position = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def read(self, token_ids: torch.Tensor) -> Seen:  # [tokens]
        """Append tokens to the cache."""
        positions = torch.arange(self.num_cached, self.num_cached + len(token_ids), device=token_ids.device)
        seen = self._forward(token_ids[None], positions[None], None)
        self.num_cached += len(token_ids)
        return seen

    def verify(self, tree: TokenTree) -> Seen:  # one tree, without padding
        """Look at root and nodes at once; `commit` must follow."""
        visible = functional.pad(token_tree.attention_mask(tree), (self.num_cached, 0), value=True)
        bias = torch.zeros(visible.shape, dtype=self.model.dtype, device=visible.device)
        bias = bias.masked_fill(~visible, torch.finfo(bias.dtype).min)  # [1, 1 + N, num_cached + 1 + N]
        return self._forward(tree.token_ids, self.num_cached + tree.depths, bias[:, None])

    def commit(self, nodes: torch.Tensor) -> None:  # [kept], the root first
        """Keep the keys and values of these nodes of the tree last verified, and forget the others."""
        context = torch.arange(self.num_cached, device=nodes.device)
        kept = torch.cat((context, self.num_cached + nodes))
        cached: list[Any] = self.cache.layers
        for layer in cached:  # keys and values: [1, heads, num_cached + 1 + N, head_dim]
            layer.keys, layer.values = layer.keys[..., kept, :], layer.values[..., kept, :]
        self.num_cached = len(kept)

    def lend_head(self, drafter: ReDrafter) -> None:
        """Tie a drafter without a head to the target's.

        Raises:
            ValueError: the drafter was made for another target.
        """
        head = self.head.weight
        sizes = drafter.config.vocab_size, drafter.config.hidden_size
        if sizes != tuple(head.shape):
            raise ValueError(
                f"the drafter was made for a target of (vocab_size, hidden_size) {sizes}, but this one has "
                f"{tuple(head.shape)}: use a drafter trained for this target"
            )
        if drafter.config.tie_lm_head:
            drafter.tie_head(head)

    def _forward(self, token_ids: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor | None) -> Seen:
        # what the head is given is the last hidden state in every architecture; what it returns may yet be scaled
        heard: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
        try:
            with layers.outputs_of(self.model, self.fused_layers) as outputs:
                output = self.model(
                    input_ids=token_ids,
                    position_ids=position_ids,
                    attention_mask=mask,
                    past_key_values=self.cache,
                    use_cache=True,
                )
        finally:
            hook.remove()
        return Seen(torch.cat((heard[0], *outputs), dim=-1)[0], output.logits[0])


def generate(
    target: PreTrainedModel,
    drafter: ReDrafter,
    input_ids: torch.Tensor,  # [prompt]
    max_new_tokens: int,
    *,
    shape: BeamShape | None = None,
    num_nodes: int | None = None,
    eos_token_ids: Collection[int] = (),
    sample: Sample | None = None,
    sharpness: float | None = None,
) -> Generation:
    """Return what `autoregressive` returns, in fewer steps.

    Args:
        shape: beams to search; the drafter's own by default.
        num_nodes: tree nodes to verify per step, 1..63; the drafter's own by default.
        eos_token_ids: tokens that end the text.
        sample: draws the tokens, called once per token in the order of the text; the most probable one by default.
            The noise of a `NoisySampler` is known to the drafter.
        sharpness: what the drafter's logits are multiplied by; by default 1 where `sample` is another function, else
            `SHARPNESS`.

    Raises:
        ValueError: the prompt is empty, a number is out of range, or the drafter was made for another target.
        NotImplementedError: the target's cache cannot be rolled back (`Target`).
    """
    shape = shape or BeamShape(drafter.config.beam_width, drafter.config.draft_length)
    num_nodes = drafter.config.num_speculative_tokens if num_nodes is None else num_nodes
    if sharpness is None:
        sharpness = SHARPNESS if sample is None or isinstance(sample, NoisySampler) else 1.0
    sample = sample or _most_probable
    with torch.inference_mode():
        context = _open(target, input_ids, max_new_tokens, drafter.config.fused_layers)
        context.lend_head(drafter)
        seen = context.read(input_ids)
        hidden, root = seen.hidden[-1:], sample(seen.logits[-1:])
        token_ids: list[int] = root.tolist()
        paths: list[list[int]] = []
        while len(token_ids) < max_new_tokens and token_ids[-1] not in eos_token_ids:
            tree = _draft(drafter, context, hidden, root, shape, num_nodes, sample, sharpness)
            seen = context.verify(tree)
            accepted = _accept(tree, seen.logits, sample)
            nodes = accepted.nodes[0]
            context.commit(nodes)
            hidden, root = seen.hidden[nodes[-1:]], accepted.token_ids[0, -1:]
            token_ids += _until_stop(accepted.token_ids[0].tolist(), eos_token_ids)
            paths.append(nodes[1:].tolist())
    return Generation(token_ids[:max_new_tokens], paths)


def autoregressive(
    target: PreTrainedModel,
    input_ids: torch.Tensor,  # [prompt]
    max_new_tokens: int,
    *,
    eos_token_ids: Collection[int] = (),
    sample: Sample | None = None,
) -> Generation:
    """Return the text of the target alone, one token per forward: the control of `generate`, with its arguments."""
    sample = sample or _most_probable
    with torch.inference_mode():
        context = _open(target, input_ids, max_new_tokens)
        token_ids: list[int] = sample(context.read(input_ids).logits[-1:]).tolist()
        paths: list[list[int]] = []
        while len(token_ids) < max_new_tokens and token_ids[-1] not in eos_token_ids:
            seen = context.read(input_ids.new_tensor(token_ids[-1:]))
            token_ids += sample(seen.logits).tolist()
            paths.append([])
    return Generation(token_ids, paths)


def _draft(
    drafter: ReDrafter,
    context: Target,
    hidden: torch.Tensor,  # [1, input_size]
    root: torch.Tensor,  # [1]
    shape: BeamShape,
    num_nodes: int,
    sample: Sample,
    sharpness: float,
) -> TokenTree:
    """Return the best continuations of the root, as one tree without padding."""
    length = shape.length
    if context.max_position is not None:
        # the root will be cached; no node may stand where the target has no position
        length = min(length, context.max_position - context.num_cached - 1)
        if length < 1:
            return token_tree.chain(root[:, None])
    # a width of 1 asks for a chain; with more, the runners-up of every depth are candidates too
    num_candidates = num_nodes if shape.width > 1 else 1
    hidden = hidden.to(next(drafter.parameters()).dtype)
    shape = shape._replace(length=length)
    foresight = _foresight(sample, length, drafter, hidden.device)
    candidates = beam_search.search(
        drafter, context.embed, hidden, root, shape, num_candidates, sharpness=sharpness, foresight=foresight
    )
    tree = token_tree.best_nodes(root, candidates, num_nodes)
    size = 1 + int(tree.num_nodes)
    return tree._replace(**{name: column[:, :size] for name, column in tree._asdict().items() if column.ndim == 2})


def _foresight(sample: Sample, length: int, drafter: ReDrafter, device: torch.device) -> Foresight | None:
    """Return what is known of the next draws."""
    if not isinstance(sample, NoisySampler):
        return None
    noise = sample.foresee(length, drafter.drafted_ids(device))
    return lambda depth, logits: logits + noise[depth]


def _accept(tree: TokenTree, logits: torch.Tensor, sample: Sample) -> acceptance.Walk:
    return acceptance.walk(tree, lambda nodes: sample(logits[nodes]))


def _until_stop(token_ids: list[int], eos_token_ids: Collection[int]) -> list[int]:
    """Return the tokens up to the first that ends the text, that one included."""
    ends = [i for i, token_id in enumerate(token_ids) if token_id in eos_token_ids]
    return token_ids[: ends[0] + 1] if ends else token_ids


def _most_probable(logits: torch.Tensor) -> torch.Tensor:  # [rows, vocab] -> [rows]
    return logits.argmax(dim=-1)


def _open(
    target: PreTrainedModel, input_ids: torch.Tensor, max_new_tokens: int, fused_layers: Sequence[int] | None = None
) -> Target:
    if input_ids.ndim != 1 or len(input_ids) == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, but it must be one prompt of at least 1 token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but it must be at least 1")
    return Target(target, len(input_ids) + max_new_tokens, fused_layers)


def _check_supported(model: PreTrainedModel, max_length: int) -> None:
    name = type(model).__name__
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder or model._is_stateful or not takes_positions:
        raise NotImplementedError(
            f"{name} is not supported: a tree can only be verified by a decoder that attends in every layer "
            "and takes position_ids"
        )
    attention = model.config._attn_implementation
    if attention not in ("eager", "sdpa"):
        raise NotImplementedError(
            f"attention {attention!r} takes no tree mask: load {name} with attn_implementation='sdpa'"
        )
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotImplementedError(f"{name} is not supported: its cache ({type(layer).__name__}) cannot drop tokens")
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window < max_length:
            raise NotImplementedError(
                f"{name} attends to {layer.sliding_window} tokens, but prompt and output have {max_length}: "
                "the sliding window must hold them all"
            )
