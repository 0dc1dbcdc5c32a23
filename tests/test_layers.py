"""Who may import whom: rooms in one order, and no circle."""

import ast
from pathlib import Path

import bipft_jax

ROOT = Path(bipft_jax.__file__).parent
# From the ground up: a module imports from its own room and from those before it.
LAYERS = (
    ("errors", "paths", "json_text", "command_line", "processes", "points", "heap"),
    ("quantization",),
    ("models",),
    ("data",),
    ("objectives",),
    ("checkpoints",),
    ("training",),
    ("config_keys", "reports", "stages"),
    (
        "pretrain",
        "finetune",
        "predict",
        "fill_mask",
        "generate",
        "plot",
        "comparison",
        "interop",
        "cost",
    ),
    ("finetune_all", "sweeps", "scaling", "baselines", "pods", "benchmarks"),
)
LONGEST_FILE = 500  # lines


def imported() -> dict[str, set[str]]:
    """The modules of the library that each of them imports when it is loaded, or later."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }
    graph = {}
    for module, path in files.items():
        graph[module] = set()
        tree = ast.parse(path.read_text())
        of_types = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or id(node) in of_types:
                continue
            package, _, inner = (node.module or "").partition(".")
            if package == "bipft_jax":
                names = [f"{inner}.{alias.name}".lstrip(".") for alias in node.names]
                graph[module] |= {name if name in files else inner for name in names} - {""}
    return graph


def test_no_import_goes_up():
    height = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    for module, others in imported().items():
        if module == "__init__":
            continue
        room = module.partition(".")[0]
        for other in others:
            theirs = other.partition(".")[0]
            assert room == theirs or height[theirs] <= height[room], f"{module} imports {other}"


def test_there_is_no_circle():
    graph = imported()
    while leaves := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these import each other: {', '.join(sorted(graph))}"


def test_only_checkpoints_know_orbax():
    knowing = {
        path.relative_to(ROOT).parts[0]
        for path in ROOT.rglob("*.py")
        if "import orbax" in path.read_text()
    }
    assert knowing == {"checkpoints"}


def test_a_table_of_recipes_imports_no_kernel():
    graph, seen = imported(), set()
    todo = ["models.recipes"]
    while todo:
        seen.add(module := todo.pop())
        todo += graph[module] - seen
    assert "models.fused_attention" not in seen


def test_no_file_is_long():
    lines = {path.name: len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert max(lines.values()) <= LONGEST_FILE, max(lines, key=lines.get)
