"""Places: a disk and both kinds of buckets behave alike, and faults on the way are survived."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from gptjax import storage
from gptjax.config import UserError
from gptjax.storage import BucketPath, Place
from tests import buckets

SCHEMES = ("gs", "s3")


def test_a_place_is_read_and_written_alike_on_a_disk_and_in_a_bucket(folder: Place) -> None:
    assert storage.children(folder / "absent") == []
    assert not (folder / "a").exists()
    with pytest.raises(FileNotFoundError) as missing:
        (folder / "a").read_bytes()
    assert missing.value.filename == str(folder / "a") or str(missing.value.filename)
    storage.replace_file(folder / "a", b"1")
    storage.replace_file(folder / "a", b"2")
    (folder / "b").mkdir(exist_ok=True)
    storage.replace_file(folder / "b" / "ä 1%20#?.txt", "ö".encode())
    storage.replace_file(folder / "ab", b"")
    assert (folder / "a").read_bytes() == b"2" and (folder / "ab").read_bytes() == b""
    assert (folder / "b" / "ä 1%20#?.txt").read_text(encoding="utf-8") == "ö"
    assert storage.children(folder) == [folder / "a", folder / "ab", folder / "b"]
    assert storage.files(folder) == ["a", "ab", "b/ä 1%20#?.txt"]
    assert [(p.is_file(), p.is_dir(), p.exists()) for p in storage.children(folder)] == [
        *[(True, False, True), (True, False, True), (False, True, True)]
    ]
    storage.remove(folder / "b")
    storage.remove(folder / "b")
    (folder / "ab").unlink()
    with pytest.raises(FileNotFoundError):
        (folder / "ab").unlink()
    (folder / "ab").unlink(missing_ok=True)
    assert storage.files(folder) == ["a"]
    assert storage.create(folder / "once", b"first") and not storage.create(folder / "once", b"2")
    assert (folder / "once").read_bytes() == b"first"


def test_removing_a_folder_leaves_what_only_begins_like_it(far: BucketPath) -> None:
    for name in ("run/a", "run/b/c", "runs", "run.lock", "run0/a"):
        storage.replace_file(far / name, b"x")
    storage.remove(far / "run")
    assert storage.files(far) == ["run.lock", "run0/a", "runs"]


@pytest.mark.parametrize(
    "text, url",
    [
        ("s3://lab/a/b", "s3://lab/a/b"),
        ("gs://lab", "gs://lab"),
        ("gs://lab/", "gs://lab"),
        ("s3://lab//a///b/", "s3://lab/a/b"),
    ],
)
def test_a_url_is_a_bucket_s_and_stays_one(text: str, url: str) -> None:
    place = storage.expand(text)
    assert isinstance(place, BucketPath) and str(place) == url
    assert storage.expand(place) == place
    assert str(place / "c" / "d") == f"{url}/c/d"
    assert (place / "c").parent == place and (place / "c.json").suffix == ".json"
    assert (place / "c").with_name("d") == place / "d"


@pytest.mark.parametrize("text", ["s3:/lab/a", "a://b", "http://lab/x", "s3://", "gs://ab/x"])
def test_other_urls_are_no_places(text: str) -> None:
    assert storage.expand(f"./{text.replace('//', '/')}") == Path(text.replace("//", "/"))
    with pytest.raises(UserError, match="is no place for files: write a path, gs://BUCKET/X or s3"):
        storage.expand(text)


def test_tensorstore_finds_the_folder_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, wanted in (("../run", tmp_path / "run"), ("run", tmp_path / "here" / "run")):
        place = storage.kvstore(storage.expand(name))
        storage.open_kvstore(place, None).write("x", b"1").result()
        assert (wanted / "x").read_bytes() == b"1"


def test_an_empty_text_is_no_place() -> None:
    """Of `--workdir=$RUN` where RUN is not set: not the folder that one happens to be in."""
    with pytest.raises(UserError, match="an empty text: write a path"):
        storage.expand("")


def test_what_must_lie_on_this_machine_is_no_url() -> None:
    assert storage.local("a/b") == Path("a/b")
    with pytest.raises(UserError, match=r"s3://lab/x must be a path on this machine"):
        storage.local("s3://lab/x")


def test_a_busy_store_is_asked_again(bucket: buckets.Proxy, far: BucketPath) -> None:
    requests: list[str] = []

    def busy_twice(method: str, path: str) -> str:
        requests.append(method)
        return "busy" if requests.count(method) <= 2 else "pass"

    bucket.fault = busy_twice
    storage.replace_file(far / "a", b"1")
    assert (far / "a").read_bytes() == b"1"
    assert requests.count("GET") == 3


@pytest.mark.parametrize("fault", ["unanswered", "twice"])
def test_a_create_is_won_once_though_its_answer_is_lost_or_it_arrives_twice(
    bucket: buckets.Proxy, far: BucketPath, fault: str
) -> None:
    written = 0

    def fail_first_write(method: str, path: str) -> str:
        nonlocal written
        written += method in ("PUT", "POST")
        return fault if method in ("PUT", "POST") and written == 1 else "pass"

    bucket.fault = fail_first_write
    assert storage.create(far / "once", b"mine"), "the winner took itself for another"
    assert not storage.create(far / "once", b"other")
    assert (far / "once").read_bytes() == b"mine"


def test_a_late_answer_is_waited_for(bucket: buckets.Proxy, far: BucketPath) -> None:
    bucket.fault = lambda method, path: 0.5
    storage.replace_file(far / "a", b"1")
    assert (far / "a").read_bytes() == b"1"


def test_a_dead_server_is_one_line_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The retries end: what they come to is not waited for here."""
    assert sum(min(0.2 * 2**i, 2.0) for i in range(storage.RETRIES["max_retries"])) < 10
    monkeypatch.setattr(storage, "RETRIES", storage.RETRIES | {"max_retries": 2})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for scheme in SCHEMES:
        with buckets.served(scheme) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
            before = time.monotonic()
            with pytest.raises(OSError) as caught:
                (storage.expand(f"{scheme}://{buckets.BUCKET}/x")).read_bytes()
            assert time.monotonic() - before < 30
            assert "\n" not in str(caught.value) and f"{scheme}://{buckets.BUCKET}/x" in str(
                caught.value
            )
            assert proxy.requests == []


def test_a_request_that_gets_no_answer_ends(
    bucket: buckets.Proxy, far: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ANSWER_SECONDS", 0.3)
    bucket.fault = lambda method, path: 2.0
    with pytest.raises(OSError, match="no answer"):
        far._do(lambda kv: kv.read("x"), storage.ANSWER_SECONDS)


def _seconds_to_fail(path: BucketPath) -> float:
    before = time.monotonic()
    with pytest.raises(storage.Unreachable):
        storage.create(path, b"1")
    return time.monotonic() - before


def test_patience_outlasts_a_store_that_is_away(
    bucket: buckets.Proxy, far: BucketPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than the retries of one request."""
    monkeypatch.setattr(storage, "RETRIES", {"max_retries": 1, "initial_delay": "10ms"})
    storage._open.cache_clear()
    back = time.monotonic() + 2.5
    bucket.fault = lambda method, path: "busy" if time.monotonic() < back else "pass"
    with pytest.raises(storage.Unreachable):
        storage.create(far / "a", b"1")
    with storage.patient():
        assert storage.create(far / "a", b"1")
        monkeypatch.setattr(storage, "PATIENCE_SECONDS", 1.5)
        bucket.fault = lambda method, path: "busy"
        assert _seconds_to_fail(far / "b") > 1.5
        # What follows, as the process ends, does not wait for as long again.
        assert _seconds_to_fail(far / "b") < 1.0
    storage._open.cache_clear()


def test_a_bucket_that_is_not_there_is_told(bucket: buckets.Proxy) -> None:
    if bucket.scheme == "gs":
        bucket.fault = lambda method, path: "refused" if method == "POST" else "pass"
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        storage.create(storage.expand(f"{bucket.scheme}://absent/a"), b"1")
    bucket.fault = lambda method, path: "pass"


def test_objects_that_stand_for_folders_are_no_files(far: BucketPath) -> None:
    for name in ("/", "/run/", "/run/a", "/run/b/"):
        storage._open(far.scheme, far.bucket).write(far.key + name, b"").result()
    assert storage.files(far) == ["run/a"]
    assert storage.children(far) == [far / "run"]
    assert storage.children(far / "run") == [far / "run" / "a"]
    assert not (far / "run" / "b").exists() and (far / "run").is_dir()


def test_a_refusal_for_good_is_not_tried_again(bucket: buckets.Proxy, far: BucketPath) -> None:
    bucket.fault = lambda method, path: "forbidden"
    before = time.monotonic()
    with pytest.raises(OSError, match="PERMISSION_DENIED"), storage.patient():
        storage.create(far / "a", b"1")
    assert time.monotonic() - before < storage.PATIENCE_SECONDS / 4
