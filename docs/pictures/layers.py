# SPDX-License-Identifier: LGPL-2.1-or-later
"""The package's layers, from its imports: checked by tests/unit/test_layers.py, and drawn."""

from __future__ import annotations

import ast
import graphlib
from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

PACKAGE = "xenaltp2m"
TREE = Path(__file__).resolve().parents[2]
LAYERS = (
    ("errors", "types"), ("abi",), ("values",), ("backend",), ("handles",), ("tools",),
    ("", "testing"), ("cli", "__main__"),
)  # fmt: skip
"""What lies in the package's folder, lowest first; '' is the package itself, what users import."""
PURPOSES = (
    "errors, numbers",
    "what C and the CPU look like",
    "events, responses, states",
    "what speaks to a hypervisor",
    "domains, views, the monitor",
    "what is built on handles",
    "what users import",
    "parses, calls, prints",
)
"""Of each layer."""

Graph = dict[str, set[str]]

_WIDTH, _LEFT, _TOP, _GAP = 850, 210, 16, 14
_CHIP_HEIGHT, _CHIP_GAP, _LETTER, _PAD = 24, 8, 7.4, 9
_RIGHT = 660
"""Where the layers' boxes end, and the arrows begin."""


def modules(root: Path) -> dict[str, ast.Module]:
    """Parse every module of a package, by its name within it; the package itself is ''."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imported(tree: ast.Module, known: Mapping[str, object]) -> Iterator[str]:
    """Yield what a module imports of the package: at import, in a function, or for its types."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used in this package"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [one if one[len(PACKAGE) + 1 :] in known else str(node.module) for one in inner]
        else:
            continue
        for name in names:
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                yield name[len(PACKAGE) + 1 :]


def graph_of(found: dict[str, ast.Module]) -> Graph:
    """Return which modules each module imports."""
    return {name: set(imported(tree, found)) - {name} for name, tree in found.items()}


def layer_of(module: str) -> int:
    """Return the number of a module's layer, from below.

    Raises:
        LookupError: It lies in no layer.
    """
    top = module.partition(".")[0]
    for at, layer in enumerate(LAYERS):
        if top in layer:
            return at
    raise LookupError(f"say in LAYERS where {module} belongs")


def arrows_up(graph: Graph) -> list[str]:
    """List the imports that go from a layer to a higher one."""
    return [
        f"{source} imports {target}"
        for source, targets in graph.items()
        for target in sorted(targets)
        if layer_of(target) > layer_of(source)
    ]


def circle(graph: Graph) -> list[str]:
    """Return some modules that import each other in a circle; none where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def layers() -> str:
    """Draw the layers: what lies in each, and how many imports lead to those below."""
    graph = graph_of(modules(TREE / PACKAGE))
    drawn: list[str] = []
    middles: dict[int, float] = {}
    top = float(_TOP)
    for at in reversed(range(len(LAYERS))):
        chips, height = _chips(at, graph, top)
        name = " · ".join(one or PACKAGE for one in LAYERS[at])
        drawn += [
            f'  <rect class="cell" x="8" y="{top}" width="{_RIGHT - 8}" height="{height}" rx="6"/>',
            f'  <text class="head" x="20" y="{top + 22}">{escape(name)}</text>',
            f'  <text class="faint" x="20" y="{top + 40}">{escape(PURPOSES[at])}</text>',
            *chips,
        ]
        middles[at] = top + height / 2
        top += height + _GAP
    drawn += _arrows(graph, middles)
    return _PICTURE.format(height=top, width=_WIDTH, body="\n".join(drawn))


def _chips(layer: int, graph: Graph, top: float) -> tuple[list[str], float]:
    """Draw the modules and folders of a layer; return them, and the height of the layer."""
    names: dict[str, int] = {}
    for module in graph:
        if module and layer_of(module) == layer:
            parts = module.split(".")
            name = parts[1] if len(parts) > 1 else ""
            if name and not name.startswith("_"):
                names[name] = names.get(name, 0) + 1
    drawn: list[str] = []
    x, y = float(_LEFT), top + 8
    for name, count in names.items():
        text = f"{name}/" if count > 1 else name
        width = len(text) * _LETTER + 2 * _PAD
        if x + width > _RIGHT - 8:
            x, y = float(_LEFT), y + _CHIP_HEIGHT + _CHIP_GAP
        size = f'width="{width:.0f}" height="{_CHIP_HEIGHT}"'
        drawn += [
            f'  <rect class="chip" x="{x:.0f}" y="{y:.0f}" {size} rx="4"/>',
            f'  <text class="code" x="{x + _PAD:.0f}" y="{y + 16:.0f}">{escape(text)}</text>',
        ]
        x += width + _CHIP_GAP
    return drawn, max(y + _CHIP_HEIGHT + 8 - top, 50)


def _arrows(graph: Graph, middles: Mapping[int, float]) -> Iterator[str]:
    """Draw an arrow from each layer to each one that it imports from, with their number."""
    counts = Counter(
        (layer_of(source), layer_of(target))
        for source, targets in graph.items()
        for target in targets
        if layer_of(source) != layer_of(target)
    )
    for (source, target), count in sorted(counts.items()):
        start, end = middles[source], middles[target]
        far = _RIGHT + 26 * (source - target)
        yield (
            f'  <path class="way" marker-end="url(#tip)" d="M{_RIGHT} {start:.0f} '
            f'C{far} {start:.0f} {far} {end:.0f} {_RIGHT + 6} {end:.0f}"/>'
        )
        x, y = _RIGHT + 26 * (source - target) * 0.75, (start + end) / 2
        yield f'  <text class="count" x="{x:.0f}" y="{y + 4:.0f}">{count}</text>'


_PICTURE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" role="img" \
aria-labelledby="title desc">
  <!-- SPDX-License-Identifier: LGPL-2.1-or-later -->
  <title id="title">The layers of the package</title>
  <desc id="desc">Each box is a layer, with its modules and folders. Each arrow leads from a layer \
to a lower one that it imports from, with the number of imports. No arrow leads up.</desc>
  <style>
    svg {{ --paper: #ffffff; --ink: #1f2328; --faint: #6e7781; --line: #8c959f; --cell: #f6f8fa; \
--mark: #ddf4ff; --edge: #0969da; }}
    @media (prefers-color-scheme: dark) {{
      svg {{ --paper: #161b22; --ink: #e6edf3; --faint: #9198a1; --line: #6e7681; --cell: #21262d; \
--mark: #0c2d6b; --edge: #58a6ff; }}
    }}
    text {{ font: 14px sans-serif; fill: var(--ink); }}
    .head {{ font-weight: bold; }}
    .code {{ font: 12px monospace; }}
    .faint {{ font-size: 12px; fill: var(--faint); }}
    .count {{ font-size: 11px; fill: var(--faint); text-anchor: middle; stroke: var(--paper); \
stroke-width: 4; paint-order: stroke; }}
    .paper {{ fill: var(--paper); }}
    .cell {{ fill: var(--cell); stroke: var(--line); }}
    .chip {{ fill: var(--mark); stroke: var(--edge); }}
    .way {{ fill: none; stroke: var(--line); stroke-width: 1.5; }}
  </style>
  <defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" \
orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="var(--line)"/></marker></defs>
  <rect class="paper" width="{width}" height="{height:.0f}"/>
{body}
</svg>
"""


def main() -> None:
    """Write the picture."""
    (Path(__file__).parent / "layers.svg").write_text(layers(), encoding="utf-8")


if __name__ == "__main__":
    main()
