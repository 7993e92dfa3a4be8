"""Which ranks does each layer's attention reduce over, and which its MLP? Comparing those lists proves or refutes sharing.

Never by a group's name, size or a flag: the recurring bug of this field is a group chosen by size or boolean, which then
sums the wrong ranks and says nothing.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from torch.fx import Node

from . import source as model_source
from . import values
from .collectives import Collective, is_communication
from .report import LayerAudit

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
MLP = re.compile(r"mlp|feed_?forward|\bffn?\b|experts?\b|moe", re.IGNORECASE)
EMBEDDING = re.compile(r"embed|\bwte\b", re.IGNORECASE)
LAYER = re.compile(r"(?:layers?|blocks?|\bh)\.(\d+)(?:\.|$)")
NUMBER = re.compile(r"\.(\d+)(?:\.|$)")

ATTENTION_OPS = re.compile(r"scaled_dot_product|flash_attention|flex_attention|_attention")
ACTIVATIONS = values.overloads(
    "silu.default",
    "gelu.default",
    "relu.default",
    "tanh.default",
    "sigmoid.default",
    "leaky_relu.default",
    "elu.default",
    "mish.default",
    "softplus.default",
    "hardswish.default",
    "erf.default",
    "expm1.default",  # elu, as Inductor writes it
    "log1p.default",  # mish, softplus
)
EXP = values.overloads("prims::exp.default", "exp.default")
ADD = values.overloads("add.Tensor", "add.Scalar")
EMBEDDINGS = values.overloads("embedding.default")
SOFTMAX = values.overloads(
    "_softmax.default", "softmax.int", "_safe_softmax.default", "prims::exp.default", "exp.default"
)
MATMULS = values.overloads("bmm.default", "baddbmm.default", "matmul.default")
PRODUCTS = values.overloads("mm.default", "addmm.default", "linear.default", "einsum.default") | MATMULS

SEARCH_LIMIT = 400  # nodes looked at behind one all-reduce
NEAR = 12  # of these, the ones whose module names are read


@dataclass(frozen=True)
class Place:
    """Where in the model an all-reduce stands.

    Attributes:
        role: ``attention | mlp | embedding | other``.
        layer: index of the decoder layer, or None.
        source: ``file:line``, a module's path where only that is known, or an empty string.
    """

    role: str
    layer: int | None
    source: str


def place(collective: Collective, order: dict[Node, int]) -> Place:
    """Role and layer from the module stack, else from the dataflow; unknown stays unknown."""
    paths = [model_source.module_path(collective.node)]
    paths += [model_source.module_path(n) for n in islice(_producers(collective, order), NEAR)]
    role = next((r for r in map(_role_of_path, paths) if r is not None), None)
    layer = next((n for n in map(_layer_of_path, paths) if n is not None), None)
    if role is None:
        role = _role_of_dataflow(_producers(collective, order))
    if role == "embedding":
        layer = None
    return Place(role or "other", layer, str(model_source.of(collective.node)))


def _role_of_path(path: str) -> str | None:
    """The innermost path component that tells a role: ``layers.0.self_attn.o_proj`` is attention."""
    for part in reversed(path.split(".")):
        for role, pattern in (("attention", ATTENTION), ("mlp", MLP), ("embedding", EMBEDDING)):
            if pattern.search(part) and "norm" not in part:
                return role
    return None


def _layer_of_path(path: str) -> int | None:
    found = LAYER.search(path) or NUMBER.search(path)
    return int(found.group(1)) if found else None


def _producers(collective: Collective, order: dict[Node, int]) -> Iterator[Node]:
    """Nodes behind the partial sum, nearest first, not beyond the previous communication between ranks."""
    heap = [(-order[collective.x], collective.x)]
    seen = {collective.x}
    for _ in range(SEARCH_LIMIT):
        if not heap:
            return
        _, node = heapq.heappop(heap)
        if node.op != "call_function" or is_communication(node):
            continue
        yield node
        # copy(dst, src) holds nothing of dst, which is an earlier buffer: an in-place all-reduce, made functional.
        copied = node.args[1] if node.target in values.COPIES else None
        for source in [copied] if isinstance(copied, Node) else node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                heapq.heappush(heap, (-order[source], source))


def _role_of_dataflow(producers: Iterable[Node]) -> str | None:
    """Attention has an attention kernel or a softmax between two batched products; an MLP an activation; else unknown."""
    softmax = bmm = False
    activation = embedding = product = False
    for node in producers:
        if ATTENTION_OPS.search(str(node.target)):
            return "attention"
        if node.target in EXP and any(u.target in ADD and 1 in u.args for u in node.users):
            activation = True  # Inductor writes silu as x / (1 + exp(-x)); the exp of a softmax is summed and divided
        else:
            softmax = softmax or node.target in SOFTMAX
        bmm = bmm or node.target in MATMULS
        activation = activation or node.target in ACTIVATIONS
        product = product or node.target in PRODUCTS
        # Behind a product it is the residual that comes from an embedding: a head that is cut by rows, for example.
        embedding = embedding or (node.target in EMBEDDINGS and not product)
    if softmax and bmm and not activation:
        return "attention"
    if activation:
        return "mlp"
    return "embedding" if embedding else None


def order_layers(places: Sequence[Place]) -> list[Place]:
    """Give layers to a graph without module names: each attention reduction starts a new one."""
    if any(p.layer is not None for p in places):
        return list(places)
    numbered, current = [], -1
    for p in places:
        if p.role == "attention":
            current += 1
        known = p.role in ("attention", "mlp") and current >= 0
        numbered.append(Place(p.role, current if known else None, p.source))
    return numbered


def audit(
    collectives: Sequence[Collective],
    places: Sequence[Place],
    receivers: Mapping[Collective, tuple[int, ...]] | None = None,
) -> list[LayerAudit]:
    """One entry per layer: the rank lists of its attention and of its MLP, and whether they are equal.

    Args:
        receivers: of sums over more ranks than keep a row, the ranks that keep this rank's rows. They are what the next layer's
            attention has to match, so they stand for the sum here.
    """
    receivers = receivers or {}
    ranks = _lists(collectives, places, receivers)
    returned = {p.layer: c.ranks for c, p in zip(collectives, places, strict=True) if c in receivers}
    audits = []
    for layer in sorted(number for number in ranks if number is not None):
        attention, attention_note = _one(ranks[layer].get("attention"), "attention")
        mlp, mlp_note = _one(ranks[layer].get("mlp"), "MLP")
        notes = [n for n in (attention_note, mlp_note) if n]
        if layer in returned:
            notes.append(
                f"a sum over {list(returned[layer])} gives each of its blocks back to the ranks that brought it"
            )
        if any("several" in n for n in notes):
            shared: bool | None = False
        elif attention is None or mlp is None:
            shared = None
        else:
            shared = attention == mlp and len(attention) > 1
            if not shared:
                notes.append(f"attention reduces over {list(attention)}, the MLP over {list(mlp)}")
        audits.append(LayerAudit(layer, attention, mlp, shared, "; ".join(notes)))
    return audits


Lists = dict[str, set[tuple[int, ...]]]


def _lists(
    collectives: Sequence[Collective], places: Sequence[Place], receivers: Mapping[Collective, tuple[int, ...]]
) -> dict[int | None, Lists]:
    """The rank lists of attention and MLP, by layer; None for reductions whose layer is unknown."""
    found: dict[int | None, Lists] = {}
    for c, p in zip(collectives, places, strict=True):
        if p.role in ("attention", "mlp"):
            found.setdefault(p.layer, {}).setdefault(p.role, set()).add(receivers.get(c, c.ranks))
    return found


def refuted(
    collectives: Sequence[Collective],
    places: Sequence[Place],
    receivers: Mapping[Collective, tuple[int, ...]] | None = None,
) -> dict[tuple[int, ...], str]:
    """Rank lists that the graph shows to be those of attention alone or of the MLP alone, each with what shows it.

    Within a layer, a list over which one of the two reduces and the other, which reduces too, does not; where no layer has both
    (hybrids alternate), the same of the graph as a whole. A list that stands in no such place is in no contradiction: a plan
    that cuts the experts only, say, or only the embedding.

    All ranks of a list come to one answer: whether another list equals it is the same question on each of them, and an
    all-reduce that one of them issues is issued by all.
    """
    by_layer = _lists(collectives, places, receivers or {})
    both: list[tuple[int | None, Lists]] = [
        (n, lists) for n, lists in by_layer.items() if n is not None and len(lists) == 2
    ]
    if not both:
        whole: Lists = {}
        for lists in by_layer.values():
            for role, of_role in lists.items():
                whole.setdefault(role, set()).update(of_role)
        both = [(None, whole)] if len(whole) == 2 else []
    found: dict[tuple[int, ...], str] = {}
    for layer, lists in both:
        attention, mlp = lists["attention"], lists["mlp"]
        where = "attention" if layer is None else f"attention of layer {layer}"
        sides = [", ".join(str(list(r)) for r in sorted(of_role)) for of_role in (attention, mlp)]
        for ranks in attention ^ mlp:
            found.setdefault(ranks, f"{where} reduces over {sides[0]}, the MLP over {sides[1]}")
    return found


def _one(found: set[tuple[int, ...]] | None, name: str) -> tuple[tuple[int, ...] | None, str]:
    if not found:
        return None, f"no reduction of the {name} seen"
    if len(found) > 1:
        return None, f"the {name} reduces over several groups: {', '.join(str(list(r)) for r in sorted(found))}"
    ranks = next(iter(found))
    return (ranks, "") if ranks else (None, f"the group of the {name} is unknown")


def shared_groups(audits: Sequence[LayerAudit]) -> set[tuple[int, ...]]:
    """Rank lists that some layer proves to be shared."""
    return {a.attention for a in audits if a.shared and a.attention is not None}
