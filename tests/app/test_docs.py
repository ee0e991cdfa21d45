"""README and docs: their Python runs, and the commands, options, files and links that they name exist.

The pages run as written, on the embedded model: `SUBSTITUTIONS` replaces what would need the network or minutes. Pages after the
README find the folder `out` that its example writes.
"""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from jgptq import tinycode
from jgptq.app.cli import app
from jgptq.tinycode.corpus import stdlib_documents

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = stdlib_documents("held_out")[:8]
SUBSTITUTIONS = {
    '"HuggingFaceTB/SmolLM2-135M"': repr(tinycode.FOLDER),
    '"wikitext"': "TEXTS",
    "samples=512, seq_len=2048": "samples=8, seq_len=64",
    'calib, preset="fast"': 'calib, method="rtn"',
    "calib, placement": 'calib, method="rtn", placement',
    "data=4, model=2": "data=1, model=1",
    "calib, bits=4": 'calib, preset="fast", bits=4',
    "perplexity(params, tokens)": "perplexity(params, tokens[:512], seq_len=64)",
    "perplexity(qparams, tokens)": "perplexity(qparams, tokens[:512], seq_len=64)",
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fewer than 128 rows", "ignore:vLLM refuses", "ignore:transformers reads no rules"
)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language; "" for those that name none."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(page: Path) -> None:
    """Runs the Python blocks of a page in order, as one program."""
    program = "\n".join(blocks(page, "python"))
    for written, used in SUBSTITUTIONS.items():
        program = program.replace(written, used)
    exec(compile(program, str(page), "exec"), {"TEXTS": TEXTS})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's example has run."""
    place = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        with pytest.warns(UserWarning, match="fewer than 128 rows"):
            run(PAGES["README.md"])
    return place


def test_the_readmes_example_writes_a_folder(folder: Path):
    assert (folder / "out" / "config.json").is_file()


@pytest.mark.parametrize("name", [name for name in PAGES if name != "README.md" and blocks(PAGES[name], "python")])
def test_python_in_the_docs_runs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    run(PAGES[name])


def test_every_substitution_is_used():
    text = "".join("\n".join(blocks(page, "python")) for page in PAGES.values())
    assert [written for written in SUBSTITUTIONS if written not in text] == []


def commands() -> list[str]:
    """The command lines in fenced blocks and in inline code of all pages and of CONTRIBUTING; `a && b` is two."""
    lines: list[str] = []
    for page in (*PAGES.values(), ROOT / "CONTRIBUTING.md"):
        text = page.read_text(encoding="utf-8")
        fenced = "\n".join(blocks(page, "")).splitlines()
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
        single = [part.strip() for line in (*fenced, *inline) for part in line.split("#")[0].split("&&")]
        lines += [line for line in single if re.match(r"(\w+=\S+ )*(\S*/)?(jgptq|make|python)\s", line)]
    return lines


def words_of(command: str) -> list[str]:
    """The program and its arguments, without the variables before it."""
    words = shlex.split(command)
    while "=" in words[0]:
        words = words[1:]
    return words


@pytest.mark.parametrize("command", sorted({c for c in commands() if Path(words_of(c)[0]).name == "jgptq"}))
def test_commands_in_the_docs_have_known_options(command: str):
    _, name, *arguments = words_of(command)
    group = typer.main.get_command(app)
    known = {flag for option in group.commands[name].params for flag in (*option.opts, *option.secondary_opts)}
    assert [word for word in arguments if word.startswith("--") and word not in known] == []
    if arguments:  # a command that is only named, such as `jgptq demo`, takes what its reader chooses
        group.commands[name].make_context(name, list(arguments), resilient_parsing=False)


@pytest.mark.parametrize("command", sorted({c for c in commands() if Path(words_of(c)[0]).name != "jgptq"}))
def test_scripts_and_targets_in_the_docs_exist(command: str):
    program, *arguments = words_of(command)
    if Path(program).name == "make":
        targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in arguments if word not in targets] == []
    elif arguments[0] == "-m":
        module = ROOT / Path(*arguments[1].split("."))
        assert module.with_suffix(".py").is_file() or module.is_dir()
    else:
        script = (ROOT / arguments[0]).read_text(encoding="utf-8")
        assert [word for word in arguments if word.startswith("--") and f'"{word}"' not in script] == []


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md"])
def test_links_and_paths_lead_somewhere(name: str):
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith("https://"):
            continue
        linked = page if not path else page.parent / path
        headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        if not linked.exists() or (anchor and anchor not in [anchor_of(heading) for heading in headings]):
            broken.append(target)
    paths = re.findall(r"`((?:jgptq|converters|pallas_kernels|tests|benchmarks|docs)/[\w./]+)`", text)
    assert broken + [path for path in paths if not (ROOT / path).exists()] == []


def test_the_layout_that_is_described_is_the_one_that_is_enforced():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    floors = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`[\w.]+`(?:, )?)+) \|", text.partition("## Layout")[2].partition("## Style")[0], re.MULTILINE)
    assert [re.findall(r"[\w.]+", row) for row in rows] == [floor.split(" | ") for floor in floors]


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
