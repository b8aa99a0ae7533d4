"""Candidate contraction trees: which cores to merge at compile time, and in which order to contract the rest.

The only file that talks to cotengra.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from tncompile.cost.profile import DeviceProfile
from tncompile.cost.refine import Refiner
from tncompile.ir.tree import Tree, fold_tree, left_to_right, map_tree

Names = tuple[str, ...]
MAX_CORE_ELEMENTS = 1 << 27
_OPTIMAL_UP_TO = 9
_PARTITIONED_UP_TO = 12  # cores: a chain of so many has 2048 connected partitions


def ssa_to_tree(path: Sequence[Sequence[int]], count: int) -> Tree:
    """A path of pairs, each result numbered after the last, as a nested tuple."""
    trees: list[Tree] = list(range(count))
    used: set[int] = set()
    for pair in path:
        used.update(pair)
        trees.append(trees[pair[0]] if len(pair) == 1 else tuple(trees[p] for p in pair))
    rest = [t for p, t in enumerate(trees) if p not in used]
    return rest[0] if len(rest) == 1 else left_to_right(rest)


def optimal(inputs: Sequence[Names], output: Names, sizes: Mapping[str, int], minimize: str = "flops") -> Tree:
    """cotengra's optimal order for small networks, its greedy one for larger ones."""
    if len(inputs) <= 2:
        return left_to_right(range(len(inputs)))
    from cotengra.pathfinders import path_basic

    args = (list(inputs), output, dict(sizes))
    if len(inputs) <= _OPTIMAL_UP_TO:
        path = path_basic.optimize_optimal(*args, minimize=minimize, use_ssa=True)
    else:
        path = path_basic.optimize_greedy(*args, use_ssa=True)
    return ssa_to_tree(path, len(inputs))


def einsum_path(equation: str, shapes: Sequence[Sequence[int]]) -> list[int] | None:
    """cotengra's path of an einsum as `aten.einsum` takes it: pairs, flattened. None with an ellipsis."""
    subscripts, arrow, output = equation.replace(" ", "").partition("->")
    inputs = [tuple(s) for s in subscripts.split(",")]
    if "." in equation or not arrow or len(inputs) < 3:
        return None
    sizes: dict[str, int] = {}
    for names, shape in zip(inputs, shapes, strict=True):
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    from cotengra.pathfinders import path_basic

    search = path_basic.optimize_optimal if len(inputs) <= _OPTIMAL_UP_TO else path_basic.optimize_greedy
    path = search(inputs, tuple(output), sizes)
    return [position for pair in path for position in sorted(pair)] if all(len(p) == 2 for p in path) else None


class TreeSearch:
    """Searches trees of one network.

    `inputs` are the indices of its tensors, `core[p]` whether tensor p is a constant, `sizes` the sizes of
    all indices. Trees whose compile-time part would make a core of over `MAX_CORE_ELEMENTS` are not offered.
    """

    def __init__(
        self,
        inputs: Sequence[Names],
        core: Sequence[bool],
        output: Names,
        sizes: Mapping[str, int],
        profile: DeviceProfile,
    ) -> None:
        self.inputs = list(inputs)
        self.core = list(core)
        self.output = output
        self.sizes = dict(sizes)
        self.profile = profile
        self._inner_orders: dict[tuple[int, ...], Tree] = {}
        self._refiner: Refiner | None = None
        self._held = Counter(itertools.chain(output, *map(dict.fromkeys, self.inputs)))

    def kept(self, positions: Collection[int]) -> Names:
        """Indices of the contraction of some tensors, in order of first use."""
        inside = Counter(i for p in positions for i in dict.fromkeys(self.inputs[p]))
        return tuple(i for i, count in inside.items() if self._held[i] > count)

    def elements(self, positions: Collection[int]) -> int:
        """Size of the contraction of some tensors."""
        return math.prod(self.sizes[i] for i in self.kept(positions))

    def dense(self) -> Tree | None:
        """All cores merged into one: what a dense layer is. None where that is too large."""
        cores = tuple(p for p, core in enumerate(self.core) if core)
        return self._with_groups([cores] if cores else [], "flops")

    def merges(self, keep: int = 64, limit: int = 2048) -> list[Tree]:
        """Ways to merge connected cores at compile time, each with cotengra's best order of the rest.

        Of at most `limit` ways, the `keep` with the lowest bound: all cores that are left are read, in one step
        each.
        """
        cores = [p for p, core in enumerate(self.core) if core]
        partitions = itertools.islice(self._partitions(cores), limit)

        def bound(groups: list[tuple[int, ...]]) -> float:
            read = sum(self.profile.stream_time(self.elements(g), 4) for g in groups)
            return read + len(groups) * self.profile.node

        trees = [self._with_groups(groups, "combo-32") for groups in sorted(partitions, key=bound)[:keep]]
        return [tree for tree in trees if tree is not None]

    @property
    def has_many_merges(self) -> bool:
        """Whether the ways to merge the cores are too many to look at a fair part of them."""
        return sum(self.core) > _PARTITIONED_UP_TO

    def _partitions(self, cores: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
        """All partitions of some cores into connected groups."""
        if not cores:
            yield []
            return
        for group in self._connected(cores[0], cores[1:]):
            for others in self._partitions([p for p in cores if p not in group]):
                yield [tuple(sorted(group)), *others]

    def _connected(self, first: int, rest: Sequence[int]) -> Iterator[set[int]]:
        """Every connected group of `first` and some of the rest, each once."""

        def grow(group: set[int], banned: set[int]) -> Iterator[set[int]]:
            yield group
            names = {i for p in group for i in self.inputs[p]}
            for p in rest:
                if p not in group and p not in banned and names & {*self.inputs[p]}:
                    yield from grow(group | {p}, banned)
                    banned = banned | {p}

        yield from grow({first}, set())

    def orders(self, max_trials: int) -> list[Tree]:
        """cotengra's order by FLOPs alone, and that of its hyper-optimizer under our cost."""
        return [optimal(self.inputs, self.output, self.sizes), self.hyper(max_trials)]

    def hyper(self, max_trials: int) -> Tree:
        """The best of cotengra's hyper-optimizer under our own cost, in which subtrees of cores are free.

        Limited by trials and never by time, fewer for large networks: the same model must give the same file. Trials
        are not reconfigured one by one, which would take nearly all of the time: see `refined` for the best.
        """
        import cotengra

        state = random.getstate()
        random.seed(0)  # cotengra's drivers draw from it: the same model must give the same file
        try:
            optimizer = cotengra.HyperOptimizer(
                methods=["greedy"],
                minimize=self.objective(),
                max_repeats=max(2, min(max_trials, 600 // len(self.inputs))),
                parallel=False,
                reconf_opts=None,
                optlib="random",
                optlib_opts={"seed": 0},
                on_trial_error="raise",
            )
            tree = optimizer.search(self.inputs, self.output, self.sizes)
            return ssa_to_tree(tree.get_ssa_path(), len(self.inputs))
        finally:
            random.setstate(state)

    def refined(self, tree: Tree) -> Tree:
        """A tree that is predicted no slower, improved window by window."""
        if self._refiner is None:
            args = (self.inputs, self.core, self.output, self.sizes, self.profile, MAX_CORE_ELEMENTS)
            self._refiner = Refiner(*args)
        return self._refiner.improve(tree)

    def objective(self) -> Any:
        """Our cost as a cotengra objective."""
        return _objective_class()(tuple(self.core), self.profile, self.sizes)

    def estimate(self, tree: Tree) -> float:
        """Seconds of a tree without layouts: a lower bound of its schedule, to rank many trees quickly."""
        total, count = 0.0, {}  # type: float, dict[str, int]
        for names in self.inputs:
            for name in names:
                count[name] = count.get(name, 0) + 1

        def join(a: tuple[Names, bool], b: tuple[Names, bool]) -> tuple[Names, bool]:
            nonlocal total
            (result, constant), (other, other_constant) = a, b
            for names in (result, other):
                for name in names:
                    count[name] -= 1
            union = tuple(dict.fromkeys((*result, *other)))
            kept = tuple(i for i in union if i in self.output or count[i] > 0)
            for name in kept:
                count[name] += 1
            if not (constant and other_constant):
                total += step_seconds(self.profile, *map(self._size, (union, result, other, kept)))
            return kept, constant and other_constant

        fold_tree(tree, lambda position: (self.inputs[position], self.core[position]), join)
        return total

    def _size(self, names: Names) -> int:
        return math.prod(self.sizes[i] for i in names)

    def _with_groups(self, groups: Sequence[tuple[int, ...]], minimize: str) -> Tree | None:
        """The tree that first merges each group of cores, then contracts the rest in cotengra's order."""
        if any(self.elements(g) > MAX_CORE_ELEMENTS for g in groups):
            return None
        grouped = {p for g in groups for p in g}
        parts: list[tuple[int, ...]] = [(p,) for p in range(len(self.inputs)) if p not in grouped]
        parts += [tuple(g) for g in groups]
        inputs = [self.kept(g) for g in parts]
        outer = optimal(inputs, self.output, self.sizes, minimize)
        inner = [self._inner(g) for g in parts]
        return map_tree(outer, inner.__getitem__)

    def merge_order(self, group: tuple[int, ...]) -> Tree | None:
        """The order in which to merge a group of cores, None where their product is too large."""
        return None if self.elements(group) > MAX_CORE_ELEMENTS else self._inner(group)

    def _inner(self, group: tuple[int, ...]) -> Tree:
        """The order in which a group of cores is merged; the same in every partition that has the group."""
        if group not in self._inner_orders:
            self._inner_orders[group] = group[0] if len(group) == 1 else self._optimal_inner(group)
        return self._inner_orders[group]

    def _optimal_inner(self, group: tuple[int, ...]) -> Tree:
        tree = optimal([self.inputs[p] for p in group], self.kept(group), self.sizes)
        return map_tree(tree, group.__getitem__)


def step_seconds(profile: DeviceProfile, union: int, left: int, right: int, result: int) -> float:
    """Seconds of one contraction from the sizes of all its indices, of both sides and of the result."""
    return profile.node + max(2.0 * union / profile.flops, 4.0 * (left + right + result) / profile.bandwidth)


@functools.cache
def _objective_class() -> Callable[..., Any]:
    """Made on first use, so that importing this file does not import cotengra."""
    from cotengra.scoring import ExactObjective, ensure_basic_quantities_are_computed

    class RunTime(ExactObjective):  # type: ignore[misc, unused-ignore]
        """Seconds at run time: a node all of whose leaves are cores is free."""

        __slots__ = ("core", "profile", "sizes")

        def __init__(self, core: tuple[bool, ...], profile: DeviceProfile, sizes: Mapping[str, int]) -> None:
            self.core = core
            self.profile = profile
            self.sizes = sizes

        def cost_local_tree_node(self, tree: Any, node: Any) -> float:
            if tree.is_leaf(node) or all(self.core[p] for p in tree.get_subgraph(node)):
                return 0.0
            left, right = tree.children[node]
            union = {*tree.get_legs(left), *tree.get_legs(right)}
            flops = math.prod(self.sizes[i] for i in union)
            return step_seconds(self.profile, flops, tree.get_size(left), tree.get_size(right), tree.get_size(node))

        def __call__(self, trial: Any) -> float:
            ensure_basic_quantities_are_computed(trial)  # the optimizer records them
            tree = trial["tree"]
            return math.log2(1e-12 + sum(self.cost_local_tree_node(tree, node) for node, _, _ in tree.traverse()))

        def get_dynamic_programming_minimize(self) -> str:
            return "combo-32"

    return RunTime
