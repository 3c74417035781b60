"""What a layout costs on paper: bytes that travel and seconds, from a stated model of device and links.

Everything is that of the busiest rank. Bytes are those a rank receives from others (it sends as many, and links are full
duplex). `B batch, S tokens, H heads, H_kv key heads, D head size, P = R U ranks of a ring of R times Ulysses over U,
e bytes per element`:

- Ulysses: tokens of a row of U ranks change places with heads: `S/P (U-1)/U (H + 2 H_kv) D` in, `S/P (U-1)/U H D` back.
- Ring and gather: `(R-1)/R S 2 H_kv/U D`, the keys and values of the other rows. A backward pass of the ring fetches them
  again and sends their gradients home, twice the forward; a gather has kept them, and moves the gradients alone.

The model leaves out stragglers, contention in the network, and what a model does beside attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastvideo.distributed.shards import split_lengths
from fastvideo.distributed.ulysses import group_lengths, share_heads

__all__ = ["H200", "HGX", "Call", "Cost", "DeviceModel", "LinkModel", "cost_of"]


@dataclass(frozen=True)
class DeviceModel:
    """How fast one device attends. The defaults are an H200's, from this project's measurements.

    Attributes:
        name: What the table calls it.
        flops: Dense attention in 16 bits, forward, in FLOP/s (`4 S_q S_kv D` per head count as its work).
        backward_flops: The same for a backward pass, whose work is 2.5 times the forward's.
        sparse_flops: Sparse attention in 16 bits, forward, counted on the keys that are kept.
        sparse_backward_flops: The same for a backward pass.
        wide_flops: Either pass in 32 or 64 bits.
        memory_bandwidth: Bytes per second that a copy reads and writes, for packing, unpacking and merging.
        memory: Bytes; a layout whose keys and values alone don't fit is refused.
        launch: Seconds that a kernel costs however small its work.
        dense_host: Seconds that the host takes to launch one pass of dense attention.
        sparse_host: The same of sparse attention, whose coarse stage is many kernels.
        share_host: Seconds of host that a shared call takes beside attention and exchanges.
        exchange_host: Seconds of host for each exchange.
        peer_host: Seconds of host for each other rank in it.
    """

    name: str = "H200"
    flops: float = 560e12
    backward_flops: float = 528e12
    sparse_flops: float = 500e12
    sparse_backward_flops: float = 390e12
    wide_flops: float = 40e12
    memory_bandwidth: float = 4.2e12
    memory: float = 141e9
    launch: float = 10e-6
    dense_host: float = 0.1e-3
    sparse_host: float = 0.6e-3
    share_host: float = 0.3e-3
    exchange_host: float = 0.025e-3
    peer_host: float = 0.02e-3

    def rate(self, call: Call, backward: bool) -> float:
        """Return the FLOP/s of one pass of a call."""
        if call.element_size > 2:
            return self.wide_flops
        if call.is_sparse:
            return self.sparse_backward_flops if backward else self.sparse_flops
        return self.backward_flops if backward else self.flops


@dataclass(frozen=True)
class LinkModel:
    """How fast ranks talk. The defaults are an HGX node's: NVLink 4 inside, one 400 Gb/s network card per device outside.

    Attributes:
        ranks_per_node: Neighbouring ranks that share a node.
        node_bandwidth: Usable bytes per second of one rank, one way, inside its node.
        network_bandwidth: The same between nodes.
        latency: Seconds that an exchange takes however few its bytes.
        peer_latency: Seconds for each rank that takes part in it.
        contention: Seconds that computation loses to each second of communication hidden behind it, inside a node: copies take
            bandwidth of the memory, and parts of attention are less efficient. Between nodes a byte costs the same, so a second
            less.
    """

    ranks_per_node: int = 8
    node_bandwidth: float = 365e9
    network_bandwidth: float = 45e9
    latency: float = 20e-6
    peer_latency: float = 1e-6
    contention: float = 0.4


@dataclass(frozen=True)
class Call:
    """One attention call over all ranks.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        seq: Queries of all ranks together.
        key_len: Keys of all ranks together.
        head_size: Size of a head.
        batch: Batch size.
        element_size: Bytes of an element.
        replicated: Tokens that every rank holds.
        causal: Each query sees only keys up to its own position.
        is_sparse: A query selects tiles of keys.
        sparsity: Share of the keys that it skips.
        has_gate: A gate like the query travels too.
    """

    heads: int
    kv_heads: int
    seq: int
    key_len: int
    head_size: int
    batch: int
    element_size: int
    replicated: int = 0
    causal: bool = False
    is_sparse: bool = False
    sparsity: float = 0.0
    has_gate: bool = False

    def work(self, rows: float, keys: float, heads: float) -> float:
        """Return the forward FLOP of `rows` queries over `keys` keys."""
        return 4.0 * self.batch * rows * keys * heads * self.head_size * (1 - self.sparsity) * (0.5 if self.causal else 1.0)

    def exposed_share(self, ulysses: int, pieces: int) -> float:
        """Return the share of an exchange that nothing hides: the way here of the first piece, and the way back of the last."""
        lengths = group_lengths(max(1, self.kv_heads // ulysses), pieces)
        return lengths[0] / sum(lengths)

    def size(self, tokens: float, heads: float) -> float:
        """Return the bytes of `tokens` tokens of `heads` heads."""
        return float(self.batch * tokens * heads * self.head_size * self.element_size)


H200 = DeviceModel()
HGX = LinkModel()


@dataclass(frozen=True)
class Cost:
    """One pass of the busiest rank.

    Attributes:
        num_bytes: Bytes that it receives.
        compute: Seconds of attention, copies and merging, and what they lose to hidden communication.
        communication: Seconds of exchange, hidden or not.
        exposed: Those of them during which nothing is computed.
        host: Seconds in which the host launches all this, while the device works on what it launched before.
    """

    num_bytes: float
    compute: float
    communication: float
    exposed: float
    host: float

    @property
    def time(self) -> float:
        """Seconds in all: of the device, or of the host where it takes longer."""
        return max(self.compute + self.exposed, self.host)


@dataclass(frozen=True)
class _Shares:
    """The most that any rank has of a call in a layout: tokens, heads, and bytes of others, swapped, shared and both."""

    rows: int
    keys: int
    heads: int
    kv_heads: int
    own_rows: int
    own_keys: int
    swapped: float
    shared: float
    received: float


def shares_of(call: Call, ring: int, ulysses: int) -> _Shares:
    """Return the most tokens and heads that a rank works on, `own_` those it starts with, and the bytes it receives."""
    lengths, key_lengths = split_lengths(call.seq, ring * ulysses), split_lengths(call.key_len, ring * ulysses)
    shares = share_heads(call.heads, call.kv_heads, ulysses)
    heads, kv_heads = ([stop - start for start, stop in intervals] for intervals in shares)
    num_like_query = 2 if call.has_gate else 1
    swapped, shared = [], []
    for row in range(0, ring * ulysses, ulysses):
        rows, keys = sum(lengths[row : row + ulysses]), sum(key_lengths[row : row + ulysses])
        for column in range(ulysses):
            own_rows, own_keys = lengths[row + column], key_lengths[row + column]
            arriving = call.size(rows - own_rows, num_like_query * heads[column])
            arriving += call.size(keys - own_keys, 2 * kv_heads[column])
            swapped.append(arriving + call.size(own_rows, call.heads - heads[column]))
            shared.append(call.size(call.key_len - keys, 2 * kv_heads[column]))
    return _Shares(
        rows=sum(lengths[:ulysses]),  # the first ranks hold the longest shards
        keys=sum(key_lengths[:ulysses]),
        heads=max(heads),
        kv_heads=max(kv_heads),
        own_rows=lengths[0],
        own_keys=key_lengths[0],
        swapped=max(swapped),
        shared=max(shared),
        received=max(map(sum, zip(swapped, shared, strict=True))),
    )


def cost_of(
    call: Call, ring: int, ulysses: int, gathers: bool, pieces: int, backward: bool, device: DeviceModel, links: LinkModel
) -> Cost:
    """Return what one pass of a layout costs the busiest rank.

    Args:
        call: The call.
        ring: Ranks that share keys, the mesh's outer dim.
        ulysses: Ranks that swap heads for tokens, its inner dim.
        gathers: Keys are gathered at once and not fetched in turn.
        pieces: Pieces of each rank's heads, of which one travels while another is computed; see `group_lengths`.
        backward: The backward pass, alone.
        device: The device.
        links: The links.
    """
    part = shares_of(call, ring, ulysses)
    more = call.replicated
    work = call.work(part.rows + more, call.key_len + more, part.heads) * (2.5 if backward else 1.0)
    compute = work / device.rate(call, backward) + device.launch
    swap_time, copies = _swap(call, part, ulysses, pieces, backward, device, links)
    share_time, more_trips = _share_keys(call, part, ring, ulysses, gathers, pieces, backward, links)
    hidden = lost = 0.0
    if ring > 1 and not gathers:
        compute += _merging(call, part, ring, backward, device)
        # The first of R parts needs no keys of others, and the keys of each other part travel during the one before it.
        hidden = (ring - 1) * min(compute / ring, share_time / (ring - 1))
        lost = hidden * _contention(_where(ring, ulysses, links))
    exposed = call.exposed_share(ulysses, pieces)
    for seconds, where in (
        (swap_time, _where(ulysses, 1, links)),
        (share_time if gathers and not call.causal else 0.0, _where(ring, ulysses, links)),
    ):
        # Of the pieces of heads, all but the ends travel while another is computed.
        behind = min(seconds * (1 - exposed), compute - hidden)
        hidden += behind
        lost += behind * _contention(where)
    extra_bytes, extra_time = _replicated(call, ring * ulysses, ulysses, backward, links)
    communication = swap_time + share_time + extra_time
    return Cost(
        part.received + more_trips + extra_bytes,
        compute + copies + lost,
        communication,
        communication - hidden,
        _host(call, ring, ulysses, gathers, pieces, backward, device),
    )


def _host(call: Call, ring: int, ulysses: int, gathers: bool, pieces: int, backward: bool, device: DeviceModel) -> float:
    """Return the seconds in which the host launches a pass."""
    attention = device.sparse_host if call.is_sparse else device.dense_host
    if ring * ulysses == 1:
        return attention
    exchanging, parts = 0.0, 1
    if ulysses > 1:
        exchanging += ((2 if call.has_gate else 1) + 3) * (device.exchange_host + (ulysses - 1) * device.peer_host)
    if ring > 1:
        # A step of a ring talks to one other rank.
        peers, steps = (ring - 1, 1) if gathers else (1, (ring - 1) * (2 if backward else 1))
        exchanging += 2 * steps * (device.exchange_host + peers * device.peer_host)
        parts = 1 if gathers else ring
    return device.share_host + pieces * (parts * attention + exchanging)


def _swap(
    call: Call, part: _Shares, ulysses: int, pieces: int, backward: bool, device: DeviceModel, links: LinkModel
) -> tuple[float, float]:
    """Return the seconds of the swap of heads for tokens, there and back, and those of packing."""
    if ulysses == 1:
        return 0.0, 0.0
    num_like_query = 2 if call.has_gate else 1
    seconds = _exchange(part.swapped, _where(ulysses, 1, links))
    seconds += (num_like_query + 3) * pieces * (links.latency + (ulysses - 1) * links.peer_latency)
    packed = call.size(part.own_rows, call.heads)
    if backward:
        packed += call.size(part.own_rows, num_like_query * call.heads) + call.size(part.own_keys, 2 * call.kv_heads)
    # A read and a write where it is packed; inputs go straight to their places, and so does all that arrives.
    return seconds, 2 * packed / device.memory_bandwidth


def _share_keys(
    call: Call, part: _Shares, ring: int, ulysses: int, gathers: bool, pieces: int, backward: bool, links: LinkModel
) -> tuple[float, float]:
    """Return the seconds of the exchange of keys along the ring, and the bytes that it moves beyond them once."""
    if ring == 1:
        return 0.0, 0.0
    where = _where(ring, ulysses, links)
    # Causal queries go to the balanced pieces, outputs come back; in a ring the keys and values go too.
    regrouped = call.size(part.rows, 2 * part.heads) if call.causal else 0.0
    if gathers:
        latency = 2 * (1 if call.causal else pieces) * (links.latency + (ring - 1) * links.peer_latency)
        return _exchange(part.shared + regrouped, where) + latency, regrouped
    if call.causal:
        regrouped += call.size(part.keys, 2 * part.kv_heads)
    trips = 2 if backward else 1
    # At most distances some rank's keys come from another node, and the slowest rank sets the pace.
    slowest = links.network_bandwidth if where.outer else links.node_bandwidth
    step = part.shared / (ring - 1) / slowest + links.latency + links.peer_latency
    return trips * (ring - 1) * step + _exchange(regrouped, where), (trips - 1) * part.shared + regrouped


def _merging(call: Call, part: _Shares, ring: int, backward: bool, device: DeviceModel) -> float:
    """Seconds that adding partial results in float32 takes, and launching the parts."""
    elements = call.batch * part.rows * part.heads * call.head_size
    if backward:
        elements += 2 * call.batch * part.keys * part.kv_heads * call.head_size
        traffic = ring * elements * (call.element_size + 8)
    else:
        # Each part is read once and the result written once; in between float32 is written and read.
        traffic = elements * ((ring + 1) * call.element_size + (ring - 2) * 8)
    return traffic / device.memory_bandwidth + (ring - 1) * device.launch


def _replicated(call: Call, size: int, ulysses: int, backward: bool, links: LinkModel) -> tuple[float, float]:
    """Bytes and seconds of what replicated tokens exchange: outputs of other ranks' heads, or gradients of all."""
    if call.replicated == 0 or size == 1:
        return 0.0, 0.0
    if backward:
        received = call.size(call.replicated, call.heads + 2 * call.kv_heads) * (size - 1)
        return received, _exchange(received, _where(size, 1, links)) + 3 * (links.latency + size * links.peer_latency)
    if ulysses == 1:
        return 0.0, 0.0
    received = call.size(call.replicated, call.heads) * (ulysses - 1) / ulysses
    return received, _exchange(received, _where(ulysses, 1, links)) + links.latency + ulysses * links.peer_latency


def _contention(where: _Where) -> float:
    """Return what computation loses to a second of hidden communication."""
    links = where.links
    return links.contention * (min(1.0, links.network_bandwidth / links.node_bandwidth) if where.outer else 1.0)


@dataclass(frozen=True)
class _Where:
    inner: float
    outer: float
    links: LinkModel


def _where(size: int, stride: int, links: LinkModel) -> _Where:
    """Return the shares of a rank's bytes that stay in its node and that leave it, in a group of every `stride`-th rank."""
    together = min(size, max(1, links.ranks_per_node // stride))
    outer = (size - together) / (size - 1) if size > 1 else 0.0
    return _Where(1 - outer, outer, links)


def _exchange(num_bytes: float, where: _Where) -> float:
    links = where.links
    return max(num_bytes * where.inner / links.node_bandwidth, num_bytes * where.outer / links.network_bandwidth)
