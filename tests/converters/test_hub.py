"""The model card, and the upload: looked at without a network."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny

import jgptq
from converters import FolderSink, load_hf, push_to_hub, save_hf
from jgptq.errors import ConfigError, OutputError


def run(tmp_path: Path, base: Path, **settings) -> Path:
    params, config = load_hf(tiny.folder(base)), jgptq.QuantizeConfig(group_size=32, **settings)
    sink = FolderSink(tmp_path / "out", params, config, tiny.tokens())
    return sink.finish(*jgptq.quantize(params, tiny.tokens(), config=config, sink=sink))


def test_the_card_says_what_the_model_is_how_it_was_made_and_what_was_lost(tmp_path: Path):
    rules = jgptq.QuantizeConfig(rules=(jgptq.Rule(pattern=".*(up|gate)_proj", bits=8),)).rules
    with pytest.warns(UserWarning, match="transformers reads no rules"):
        out = run(tmp_path, tmp_path / "models--acme--tiny-llama" / "snapshots" / "0a1b", rules=rules)
    card = (out / "README.md").read_text()
    head, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert "base_model: acme/tiny-llama\nbase_model_relation: quantized" in head
    assert "# acme/tiny-llama, 4/8 bit" in text
    assert "14 linears are packed, 1 stay float" in text
    assert "| group_size | `32` |" in text
    assert r"| rule `.*(up\|gate)_proj` | bits `8` |" in text
    report = {row["name"]: row for row in json.loads((out / "quantize_report.json").read_text())["linears"]}
    rows = [report[f"layers.{index}.mlp.down_proj"] for index in (0, 1)]
    loss, nearest = (sum(row[key] for row in rows) for key in ("loss", "rtn_loss"))
    assert f"| mlp.down_proj | 2 | 4 | {loss:.4g} | {nearest:.4g} | {loss / nearest:.3f} |" in text
    assert "vllm serve FOLDER" in text
    assert str(tmp_path) not in card


def test_a_base_model_without_a_hub_id_is_named_and_not_linked(tmp_path: Path):
    card = (run(tmp_path, tmp_path / "mine", method="rtn") / "README.md").read_text()
    assert "base_model" not in card
    assert "# mine, 4 bit" in card


def test_a_float_folder_has_no_card(folder: Path):
    assert not (folder / "README.md").exists()


class Hub:
    """Stands in for the hub's client and keeps the calls."""

    def __init__(self):
        self.calls: list[tuple[str, dict]] = []

    def create_repo(self, repo_id: str, **kwargs) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id} | kwargs))

    def create_branch(self, repo_id: str, **kwargs) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id} | kwargs))

    def upload_folder(self, **kwargs) -> SimpleNamespace:
        self.calls.append(("upload_folder", kwargs))
        return SimpleNamespace(commit_url=f"https://hub/{kwargs['repo_id']}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    return stand_in


def test_a_folder_is_uploaded_to_a_repository_that_is_made(folder: Path, hub: Hub):
    assert push_to_hub(folder, "me/model", private=True) == "https://hub/me/model/commit/1"
    assert hub.calls == [
        ("create_repo", {"repo_id": "me/model", "private": True, "exist_ok": True}),
        (
            "upload_folder",
            {"repo_id": "me/model", "folder_path": folder, "revision": None, "commit_message": "Upload model with jgptq"},
        ),
    ]
    push_to_hub(folder, "me/model", revision="int4", message="int4")
    assert hub.calls[3] == ("create_branch", {"repo_id": "me/model", "branch": "int4", "exist_ok": True})
    assert hub.calls[4][1]["revision"] == hub.calls[4][1]["commit_message"] == "int4"


def test_an_orbax_folder_is_uploaded(tmp_path: Path, hub: Hub):
    push_to_hub(save_hf(tiny.decoder(), tmp_path / "out", format="orbax"), "me/model")
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]


def test_what_is_no_finished_folder_is_not_uploaded(tmp_path: Path, folder: Path, hub: Hub):
    with pytest.raises(ConfigError, match=r"expected config\.json and one of model\.safetensors"):
        push_to_hub(tmp_path, "me/model")
    (folder / "progress.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        push_to_hub(folder, "me/model")
    (folder / "progress.jsonl").unlink()
    with pytest.raises(ConfigError, match="'owner/name', found 'model'"):
        push_to_hub(folder, "model")
    assert hub.calls == []


def test_a_hub_that_refuses_is_named_with_the_repository(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    def refuse(**kwargs) -> None:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(hub, "upload_folder", refuse)
    with pytest.raises(OutputError, match=r"me/model: the hub did not take .*401 Unauthorized.*hf auth login"):
        push_to_hub(folder, "me/model")
