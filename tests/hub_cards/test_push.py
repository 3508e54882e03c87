"""The command `noiseopt hub push`: uploads, files that stay, and refusals."""

import functools
import re

import pytest
from huggingface_hub import HfApi
from loopback_hub import READER, WRITER, Handler

from noiseopt.cli import main
from noiseopt.hub import build
from noiseopt.hub.before_after import PICTURE
from noiseopt.hub.push import PushFailed, push

CARD, MODEL = ({card.name: card for card in build.all_cards()}[name] for name in ("cno-flux", "shapes-clip"))


@pytest.fixture(autouse=True)
def without_progress_bars(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def logged_in(hub, api, monkeypatch):
    """The loopback Hub, a login and two cards, as the command finds them."""
    monkeypatch.setattr("huggingface_hub.HfApi", functools.partial(HfApi, endpoint=hub.url))
    monkeypatch.setattr(build, "all_cards", lambda: [CARD, MODEL])
    monkeypatch.setenv("HF_TOKEN", WRITER)


def files_of(hub, name):
    return hub.repository(name).files


def commits(hub):
    return [request for request in hub.requests if "/commit/" in request]


@pytest.mark.parametrize("largest_binary", [1_000_000, 0], ids=["regular", "large file"])
def test_pictures_arrive_as_they_are(largest_binary, hub, api):
    """Both upload modes of the Hub give the same files."""
    hub.largest_binary = largest_binary
    pushed = push(CARD, "someone", api=api)
    assert files_of(hub, "someone/cno-flux") == {
        name: data if isinstance(data, bytes) else data.read_bytes()
        for name, data in build.contents(CARD, "someone").items()
    }
    assert sorted(files_of(hub, "someone/cno-flux")) == ["README.md", PICTURE, "noiseopt_bundle.py", "pipeline.py"]
    assert any(request.startswith("PUT /large/") for request in hub.requests) == (largest_binary == 0)
    assert pushed.changed and pushed.url == f"{hub.url}/someone/cno-flux"
    assert b'custom_pipeline="someone/cno-flux"' in files_of(hub, "someone/cno-flux")["README.md"]


def test_weights_arrive_as_large_files(hub, api):
    push(MODEL, "someone", api=api)
    files = files_of(hub, "someone/shapes-clip")
    assert files == {"README.md": files["README.md"]} | {n: path.read_bytes() for n, path in MODEL.uploads().items()}
    assert sum(request.startswith("PUT /large/") for request in hub.requests) == 1


def test_what_is_there_makes_no_commit_and_what_changed_is_replaced(hub, api):
    assert push(CARD, "someone", api=api).changed
    (hub.root / "someone/cno-flux/notes.txt").write_text("of the owner")
    assert not push(CARD, "someone", api=api).changed and len(commits(hub)) == 1
    (hub.root / "someone/cno-flux/pipeline.py").write_text("# of an earlier release\n")
    assert push(CARD, "someone", api=api).changed and len(commits(hub)) == 2
    files = files_of(hub, "someone/cno-flux")
    assert files.pop("notes.txt") == b"of the owner"
    assert files["pipeline.py"] == build.contents(CARD)["pipeline.py"]


@pytest.mark.slow
def test_a_tag_keeps_its_content_and_does_not_move(hub, api, tmp_path):
    push(CARD, "someone", tag="v1", api=api)
    push(CARD, "someone", tag="v1", api=api)
    kept = files_of(hub, "someone/cno-flux")
    (hub.tags("someone/cno-flux") / "v1/pipeline.py").write_text("# of an earlier release\n")
    with pytest.raises(PushFailed, match="has 'v1' with other files, which users may rely on. Choose another name"):
        push(CARD, "someone", tag="v1", api=api)
    assert len(commits(hub)) == 1
    push(CARD, "someone", tag="v2", api=api)
    folder = api.snapshot_download("someone/cno-flux", revision="v1", local_dir=tmp_path)
    assert (tmp_path / "pipeline.py").read_text() == "# of an earlier release\n" and folder == str(tmp_path)
    assert hub.repository("someone/cno-flux", "v2").files == kept


def test_private_is_private_or_refused(hub, api):
    push(CARD, "someone", private=True, api=api)
    push(CARD, "someone", private=True, api=api)
    assert hub.private == {"someone/cno-flux"}
    push(CARD, "other", api=api)
    with pytest.raises(PushFailed, match="Expected other/cno-flux to be private, but it is there and public"):
        push(CARD, "other", private=True, api=api)


def test_what_comes_back_different_is_said(hub, api, monkeypatch):
    def break_commit(handler, name, body):
        status, answer, headers = commit(handler, name, body)
        (hub.root / name / "pipeline.py").write_text("lost")
        return status, answer | {"commitOid": hub.repository(name).sha}, headers  # pyright: ignore[reportOperatorIssue]

    commit = Handler.commit
    monkeypatch.setattr(Handler, "commit", break_commit)
    with pytest.raises(PushFailed, match="to hold what was sent, but pipeline.py came back different"):
        push(CARD, "someone", api=api)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (READER, "The Hub refuses someone/cno-flux: .*rights to write.* Give `--namespace` an account that your token"),
        ("hf_forgotten", "The Hub refuses someone/cno-flux: .* Run `hf auth login` with a token that is valid."),
    ],
)
def test_tokens_that_may_not_write_are_told_so(token, message, hub):
    with pytest.raises(PushFailed, match=message):
        push(CARD, "someone", api=HfApi(endpoint=hub.url, token=token))
    assert not hub.root.exists()


def test_no_connection_is_said(hub, logged_in, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", functools.partial(HfApi, endpoint="http://127.0.0.1:9"))
    with pytest.raises(SystemExit, match="me/cno-flux was not uploaded: .* Run the same command once more"):
        main(["hub", "push", "cno-flux", "--namespace", "me"])


def test_no_login_is_said_before_the_hub_is_asked(hub, logged_in, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(SystemExit, match="Expected a login to the Hub, but found none. Run `hf auth login`"):
        main(["hub", "push", "cno-flux", "--namespace", "me"])
    assert not hub.requests


@pytest.mark.slow
def test_command_pushes_several_cards(hub, logged_in, capsys):
    arguments = ["hub", "push", "cno-flux", "shapes-clip", "cno-flux", "--namespace", "me", "--tag", "v0.1.0"]
    main(arguments)
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    cards = [f"{hub.url}/me/{name} at {hub.repository(f'me/{name}').sha[:7]}" for name in ("cno-flux", "shapes-clip")]
    assert lines == [f"{word} {card}" for word in ("pushed", "unchanged") for card in cards]


def test_dry_run_lists_all_files_and_asks_nobody(hub, logged_in, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    main(["hub", "push", "--all", "--namespace", "me", "--dry-run"])
    printed = capsys.readouterr().out
    for card in (CARD, MODEL):
        sizes = {
            name: len(data) if isinstance(data, bytes) else data.stat().st_size
            for name, data in build.contents(card, "me").items()
        }
        assert f"me/{card.name}: {sum(sizes.values()):,} bytes\n" in printed
        assert all(f"{size:,}  {name}\n" in printed for name, size in sizes.items())
    assert printed.count("README.md") == 2
    assert not hub.requests and not hub.root.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cno-flux"], "--namespace"),
        (["--namespace", "me"], "Expected either names of cards or --all."),
        (["cno-flux", "--all", "--namespace", "me"], "Expected either names of cards or --all."),
        (["cno-flix", "--namespace", "me"], "Expected a card out of reno-turbo, .*shapes-vqa, but got 'cno-flix'."),
    ],
)
def test_wrong_requests_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["hub", "push", *arguments])
    assert re.search(message, capsys.readouterr().err)
