"""The sizes of a model and what follows from them: how many weights, of which kind, and how many of them a token meets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP, in `layers` of the layers.

    count: experts of a layer; active: how many of them see a token; width: of one; shared: width of the one that sees every token.
    """

    layers: int
    count: int
    active: int
    width: int
    shared: int = 0


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values are made of one latent vector.

    rank: of that vector, which is cached, with a rotated key of `rope` channels. nope: channels of a key that are not rotated.
    value: channels of a value. query_rank: of the latent vector of the query; None where the query is projected at once.
    """

    rank: int
    rope: int
    nope: int
    value: int
    query_rank: int | None = None


@dataclass(frozen=True)
class Linear:
    """Weights [rows, columns], out_features by in_features: `times` of them in the model, of which a token passes `used`."""

    name: str
    rows: int
    columns: int
    times: int
    used: int

    @property
    def values(self) -> int:
        """Of one."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Shape:
    """The sizes that fix how many weights a model has; those of a Llama, where nothing else is said.

    gated: whether an MLP has a gate. small: numbers in norms, biases, routers and tables of positions; by default a Llama's norms.
    experts, latent: see there. windows: of each layer how many tokens it sees, 0 for all; empty where every layer sees all.
    native: the quant_method in which the model was published, or None.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    head_width: int | None = None
    gated: bool = True
    small: int | None = None
    experts: Experts | None = None
    latent: Latent | None = None
    windows: tuple[int, ...] = ()
    native: str | None = None

    @property
    def width(self) -> int:
        """Channels of one head."""
        return self.head_width or self.hidden // self.heads

    @property
    def is_llama(self) -> bool:
        """Whether every block has the seven linears of a Llama."""
        return self.gated and self.experts is None and self.latent is None

    @property
    def block_linears(self) -> dict[str, tuple[int, int]]:
        """The linears of one block, those that get quantized: name to (out_features, in_features).

        Raises ValueError where blocks are not those of a Llama: `linears` has them all.
        """
        if not self.is_llama:
            raise ValueError(f"{self.name} has other linears in a block than a Llama")
        return {linear.name: (linear.rows, linear.columns) for linear in self.linears}

    @property
    def linears(self) -> list[Linear]:
        """Every kind of linear inside the blocks."""
        return [*self._attention(), *self._mlp()]

    def _attention(self) -> list[Linear]:
        hidden, every = self.hidden, (self.layers, self.layers)
        if self.latent is None:
            queries, keys = self.heads * self.width, self.kv_heads * self.width
            return [
                Linear("q_proj", queries, hidden, *every), Linear("k_proj", keys, hidden, *every),
                Linear("v_proj", keys, hidden, *every), Linear("o_proj", hidden, queries, *every),
            ]  # fmt: skip
        latent, queries = self.latent, self.heads * (self.latent.nope + self.latent.rope)
        if latent.query_rank is None:
            asked = [Linear("q_proj", queries, hidden, *every)]
        else:
            asked = [
                Linear("q_a_proj", latent.query_rank, hidden, *every), Linear("q_b_proj", queries, latent.query_rank, *every),
            ]  # fmt: skip
        return [
            *asked,
            Linear("kv_a_proj", latent.rank + latent.rope, hidden, *every),
            Linear("kv_b_proj", self.heads * (latent.nope + latent.value), latent.rank, *every),
            Linear("o_proj", hidden, self.heads * latent.value, *every),
        ]

    def _mlp(self) -> list[Linear]:
        if self.experts is None:
            return self._mlps("", self.intermediate, self.layers, self.layers)
        e = self.experts
        found = self._mlps("", self.intermediate, self.layers - e.layers, self.layers - e.layers)
        found += self._mlps("experts.", e.width, e.layers * e.count, e.layers * e.active)
        return found + self._mlps("shared_expert.", e.shared, e.layers, e.layers)

    def _mlps(self, prefix: str, width: int, times: int, used: int) -> list[Linear]:
        if not width or not times:
            return []
        up = ("gate_proj", "up_proj") if self.gated else ("up_proj",)
        found = [Linear(prefix + name, width, self.hidden, times, used) for name in up]
        return [*found, Linear(prefix + "down_proj", self.hidden, width, times, used)]

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers inside the blocks."""
        return sum(linear.values * linear.times for linear in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """The input table. A step reads one row of it for each token, not the table."""
        return self.vocab * self.hidden

    @property
    def small_parameters(self) -> int:
        """Norms, biases, routers, tables of positions."""
        return (2 * self.layers + 1) * self.hidden if self.small is None else self.small

    @property
    def other_parameters(self) -> int:
        """Embedding, output head and small tensors: those that stay in 16 bits."""
        return self.embedding_parameters * (1 if self.tied else 2) + self.small_parameters

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """Weights that a token is multiplied with: the linears that it passes, and the head."""
        return sum(linear.values * linear.used for linear in self.linears) + self.embedding_parameters

    @property
    def cached_numbers(self) -> int:
        """Numbers that a token leaves in the cache of one layer: a key and a value for each head, or a latent vector."""
        return 2 * self.kv_heads * self.width if self.latent is None else self.latent.rank + self.latent.rope

    def cached_tokens(self, context: int) -> int:
        """Tokens in the caches of all layers together after `context` tokens: a layer with a window keeps that many."""
        if not self.windows:
            return self.layers * context
        return sum(min(context, window) if window else context for window in self.windows)


# From the config.json of meta-llama/Llama-2-7b-hf, codellama/CodeLlama-34b-hf and meta-llama/Llama-2-70b-hf.
LLAMA_7B = Shape("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000)
LLAMA_34B = Shape("CodeLlama-34B", 48, 8192, 22016, 64, 8, 32000)
LLAMA_70B = Shape("Llama-2-70B", 80, 8192, 28672, 64, 8, 32000)
SHAPES = (LLAMA_7B, LLAMA_34B, LLAMA_70B)
