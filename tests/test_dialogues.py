"""Dialogues: which tokens are scored, how they are packed, and what a step makes of them."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import chat, dialogues, model, state
from gptjax.cli import main
from gptjax.config import UserError
from gptjax.data import Batches, Store, describe, prepare
from gptjax.data.batches import PACKING, Batch
from gptjax.objectives import OBJECTIVE
from gptjax.perplexity import RowEvaluator
from gptjax.study import runner
from gptjax.tokenizer import Tokenizer, load
from tests import hub, tiny
from tests.child import Child
from tests.test_hub import COMMANDS
from tests.test_interop_tokenizer import trained, write
from tests.test_loop import SIGKILL, at_step, bits, final_state, run, timeless

transformers = pytest.importorskip("transformers")

# What the assistant says and what ends its turn stands in a mark that `transformers` reports.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_start|>\n\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
)
MISTRAL = (
    "<|im_start|>{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}[INST]{{ m.content }}[/INST]<|im_start|>"
    "{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("a") / "own"
    return write(path, trained(), chat_template=CHATML, eos_token="<|im_end|>")


def own(folder: str, template: str) -> Tokenizer:
    return dataclasses.replace(load(folder), chat_template=template)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TALK = [user("the 12 cats?"), assistant("dogs"), user("and?"), assistant("")]


# ---- what is scored


def test_scored_are_the_answers_and_their_ends(folder: str) -> None:
    tokenizer = load(folder)
    ids, scored = dialogues.encode(tokenizer, TALK)
    assert ids == chat.ids(tokenizer, chat.render(tokenizer, TALK, answer=False))
    runs = np.split(np.array(ids), np.flatnonzero(np.diff(scored)) + 1)
    shown = [tokenizer.decode(run) for run in runs]
    assert shown == [
        "<|im_start|>user\nthe 12 cats?<|im_end|>\n<|im_start|>assistant\n", "dogs<|im_end|>",
        "\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "\n",
    ]  # fmt: skip
    assert not scored[0] and scored.sum() == len(tokenizer.encode("dogs")) + 2


TEXT = st.text("ab h12.\n<|im_end|>你é", max_size=12)
TALKS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@pytest.mark.parametrize("name", TEMPLATES)
@given(talk=TALKS, system=st.booleans(), ends=st.booleans())
@settings(max_examples=40, deadline=None)
def test_scored_is_what_transformers_finds_by_marks(
    name: str, folder: str, talk: list[tuple[str, str]], system: bool, ends: bool
) -> None:
    """The templates' own marks are read there, and are nothing to us."""
    messages = [m for ask, answer in talk for m in (user(ask), assistant(answer))]
    messages = [{"role": "system", "content": "x"}] * system + messages + [user("?")] * ends
    # There the name of a special token within a text is that token: not so here.
    plain = [m | {"content": m["content"].replace("<|im_end|>", "<im>")} for m in messages]
    template = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template
    how: dict[str, Any] = {"chat_template": TEMPLATES[name], "return_dict": True}
    theirs = template(plain, return_assistant_tokens_mask=True, **how)
    turns = [n for n, m in enumerate(plain) if m["role"] == "assistant"]
    before = [template(plain[:n], add_generation_prompt=True, **how)["input_ids"] for n in turns]
    if any(theirs["input_ids"][: len(ids)] != ids for ids in before):
        with pytest.raises(UserError, match="makes a token across the border"):
            dialogues.encode(own(folder, TEMPLATES[name]), plain)
        return
    ids, scored = dialogues.encode(own(folder, TEMPLATES[name]), plain)
    assert ids == theirs["input_ids"]
    assert scored.tolist() == [bool(m) for m in theirs["assistant_masks"]]
    # As many ends are scored as there are answers, whatever these say.
    ids, scored = dialogues.encode(own(folder, TEMPLATES[name]), messages)
    assert sum(i == 2 and s for i, s in zip(ids, scored, strict=True)) == len(talk)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_marks_has_the_same_scored(name: str, folder: str) -> None:
    """As those of SmolLM2 and Llama 3: a mask made of marks that are not there says nothing."""
    bare = re.sub("{% (end)?generation %}", "", TEMPLATES[name])
    assert bare != TEMPLATES[name]
    ids, scored = dialogues.encode(own(folder, bare), TALK)
    marked = dialogues.encode(own(folder, TEMPLATES[name]), TALK)
    assert (ids, scored.tolist()) == (marked.ids, marked.scored.tolist())
    assert 0 < scored.sum() < len(ids) / 2


def test_an_answer_is_read_in_training_as_it_is_asked_for(folder: str) -> None:
    tokenizer = load(folder)
    ids, scored = dialogues.encode(tokenizer, TALK)
    for turn in (1, 3):
        asked = chat.encode(tokenizer, TALK[:turn])
        assert ids[: len(asked)] == asked and scored[len(asked)] and not scored[len(asked) - 1]


REFUSED: dict[str, tuple[str, list[dict[str, str]], str]] = {
    # As reasoning models' templates do.
    "shortens earlier answers": (
        "{% for m in messages %}{{ m.content if loop.last else '' }}<|im_end|>{% endfor %}",
        TALK,
        "renders what stands before or up to turn 1 otherwise",
    ),
    "ends the prompt otherwise": (
        CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\nWell{% endif"),
        TALK,
        "renders what stands before or up to turn 1 otherwise",
    ),
    "merges": (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}"
        "{% endfor %}",
        [user("ha"), assistant("haha")],
        "a token across the border of turn 1",
    ),
    "never stops": (
        "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}",
        TALK,
        r"ends turn 1 by none of the tokens that end an answer \(.*<\|im_end\|>\)",
    ),
    "begins with an answer": (CHATML, TALK[1:], "begins with the assistant"),
    "refuses": ("{{ raise_exception('no') }}", TALK, "refuses this dialogue: no"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_certain_is_refused(name: str, folder: str) -> None:
    template, messages, told = REFUSED[name]
    with pytest.raises(UserError, match=told):
        dialogues.encode(own(folder, template), messages)


@pytest.mark.parametrize(
    "row, first, roles",
    [
        ({"messages": TALK}, 0, "user assistant user assistant"),
        ({"prompt": "a", "completion": "b", "messages": None}, 1, "user assistant"),
        ({"prompt": TALK[:3], "completion": [assistant("b")]}, 3, "user assistant user assistant"),
    ],
)
def test_the_rows_there_are(row: dict[str, Any], first: int, roles: str, folder: str) -> None:
    messages, begins = dialogues.turns(row, "row 1")
    assert (begins, " ".join(m["role"] for m in messages)) == (first, roles)
    scored = dialogues.encode(load(folder), messages, begins).scored
    every = dialogues.encode(load(folder), messages).scored
    assert scored.sum() == (every.sum() if first < 2 else 2)


@pytest.mark.parametrize(
    "row, told",
    [
        ({}, "row 1 has neither 'messages' nor 'prompt' and 'completion': its keys are none"),
        ({"prompt": "a"}, "its keys are prompt"),
        ({"messages": "hello"}, "row 1 holds no list of messages"),
        ({"messages": []}, "row 1 holds no list of messages"),
        ({"messages": [{"role": "bot", "content": ""}]}, "role 'bot', which is none of system"),
    ],
)
def test_other_rows_are_refused(row: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        dialogues.turns(row, "row 1")


# ---- the store


def rows(count: int) -> list[dict[str, Any]]:
    """Dialogues of several lengths, of which every fifth has no answer."""
    words = ["the", "cat", "saw 12", "dogs\n", "x**2"]
    return [
        {"messages": [user(" ".join(words[: n % 4 + 1]) * 3), assistant(words[n % 5] * (n % 3))]}
        if n % 5 < 4
        else {"messages": [user("?")]}
        for n in range(count)
    ]


def jsonl(path: Path, of: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in of))
    return path


def test_a_store_of_dialogues(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, of = jsonl(tmp_path / "talks.jsonl", rows(20)), rows(20)
    out = tmp_path / "store"
    words = ["data", "dialogues", str(file), f"--out={out}", f"--tokenizer={folder}"]
    assert main([*words, "--val_fraction=0.25"]) == 0
    said = capsys.readouterr()
    assert "train: 3 of 15 rows are left out: nothing scored" in said.err
    assert "12 documents" in said.out and "4 documents" in said.out
    tokenizer = load(folder)
    kept = [row["messages"] for row in of if len(row["messages"]) > 1]
    for split, messages in (("train", kept[:12]), ("val", kept[12:])):
        store = Store.open(out / split, tokenizer)
        start = 0
        for end, talk in zip(store.document_ends.tolist(), messages, strict=True):
            ids, scored = dialogues.encode(tokenizer, talk)
            assert store.tokens(start, end).tolist() == [*ids, tokenizer.eot]
            assert store.weights(start, end).tolist() == [*scored, 0]
            start = end
    assert main([*words, "--val_fraction=0.25"]) == 0  # it is there
    assert main([*words, "--val_fraction=0.5"]) != 0
    assert "another text or val_fraction" in capsys.readouterr().err


def test_a_row_that_is_refused_is_named_and_nothing_stays(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl(tmp_path / "talks.jsonl", [*rows(3), {"messages": TALK[1:]}])
    out = tmp_path / "store"
    words = ["data", "dialogues", str(file), f"--out={out}", f"--tokenizer={folder}"]
    assert main([*words, "--val_fraction=0"]) == 2
    assert f"{file} line 4: the dialogue begins with the assistant" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]
    jsonl(file, [{"messages": [user("?")]}])
    assert main([*words, "--val_fraction=0"]) == 2
    assert "1 rows leave nothing for 'train'" in capsys.readouterr().err
    assert main([*words[:3], f"--out={out}", "--tokenizer=bytes"]) == 2
    assert "has no chat template" in capsys.readouterr().err
    # A single row is not said to leave nothing when it is wrong.
    jsonl(file, [{"message": TALK}])
    assert main(words) == 2
    assert f"{file} line 1 has neither 'messages' nor" in capsys.readouterr().err
    assert main(["data", "pairs", *words[2:]]) == 2
    assert f"{file} line 1 has no 'prompt'" in capsys.readouterr().err


def test_a_packing_that_would_cut_or_mistake_what_a_store_holds_is_refused(
    folder: str, tmp_path: Path
) -> None:
    """Dialogues cut at borders of rows, rejected texts taken as good ones, texts taken as pairs."""
    tokenizer = load(folder)
    talks = jsonl(tmp_path / "talks.jsonl", rows(20))
    pair = {"prompt": "a?", "chosen": "b", "rejected": "c"}
    pairs = jsonl(tmp_path / "pairs.jsonl", [pair] * 20)
    (tmp_path / "text.txt").write_text("a text. " * 200)
    dialogues.prepare_dialogues([talks], tmp_path / "dialogues", folder)
    dialogues.prepare_pairs([pairs], tmp_path / "pairs", folder)
    prepare([tmp_path / "text.txt"], tmp_path / "texts", folder)
    takes = {
        "texts": ["stream", "masked", "document", "whole"], "dialogues": ["whole"], "pairs": ["pairs"],
    }  # fmt: skip
    context = {"texts": 2000, "dialogues": 500, "pairs": 500}

    def opened(kind: str, packing: str) -> Batches:
        told = tiny.data(tokenizer=folder, packing=packing, sources=(str(tmp_path / kind),))
        T = 16 if packing in ("stream", "masked") else context[kind]
        return Batches(told, T, 0, "train", tokenizer)

    for kind, packings in takes.items():
        for packing in PACKING:
            if packing in packings:
                assert len(opened(kind, packing).sources[0])
                continue
            with pytest.raises(UserError) as told:
                opened(kind, packing)
            assert str(told.value) == (
                f"data.packing={packing!r} does not take {kind}, which {tmp_path / kind} holds: set "
                f"data.packing={' or '.join(packings)}"
            )


def test_parquet_has_the_same_store(folder: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.Table.from_pylist(rows(10))
    parquet.write_table(table, tmp_path / "talks.parquet")
    files = [tmp_path / "talks.parquet", jsonl(tmp_path / "talks.jsonl", rows(10))]
    made = [dialogues.prepare_dialogues([f], tmp_path / f.suffix, folder, 0.3) for f in files]
    assert made[0]["train"]["fingerprint"] == made[1]["train"]["fingerprint"]


def test_a_data_set_of_the_hub_has_the_same_store(folder: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = tmp_path / "talks.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows(10)), table)
    with hub.served(tmp_path / "hub") as running:
        repo = running.repos.setdefault("datasets/lab/talks", hub.Repo())
        repo.commit({"data/train-00000-of-00001.parquet": table.read_bytes()})
        words = [
            ["data", "dialogues", source, f"--out={tmp_path / name}", f"--tokenizer={folder}"]
            for source, name in ((str(table), "a"), ("hub:lab/talks,train", "b"))
        ]
        child = Child(COMMANDS, json.dumps([[*w, "--val_fraction=0.3"] for w in words])).wait()
    assert [line for line in child.stdout.splitlines() if line.isdigit()] == ["0", "0"], (
        child.stderr
    )
    for split in ("train", "val"):
        ours, theirs = (Store.open(tmp_path / name / split, load(folder)) for name in "ab")
        assert ours.fingerprint == theirs.fingerprint


def test_an_interrupted_store_goes_on(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = jsonl(tmp_path / "talks.jsonl", rows(20))
    whole = dialogues.prepare_dialogues([file], tmp_path / "whole", folder)
    monkeypatch.setattr("gptjax.data.store.SHARD_TOKENS", 50)
    sharded = dialogues.prepare_dialogues([file], tmp_path / "sharded", folder)
    encode, calls = dialogues.encode, 0

    def interrupted(*words: Any) -> dialogues.Dialogue:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return encode(*words)

    monkeypatch.setattr(dialogues, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dialogues.prepare_dialogues([file], tmp_path / "again", folder)
    before = calls
    again = dialogues.prepare_dialogues([file], tmp_path / "again", folder)
    assert again["train"]["fingerprint"] == sharded["train"]["fingerprint"]
    assert calls - before < 16  # of 16 dialogues those on the disk were not encoded again
    assert whole["train"]["tokens"] == again["train"]["tokens"]


# ---- its rows


@pytest.fixture(scope="module")
def store(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talks")
    file = jsonl(path / "talks.jsonl", rows(30))
    dialogues.prepare_dialogues([file], path / "store", folder, val_fraction=0.2)
    return path / "store"


def batches(store: Path, folder: str, context: int = 48, **knobs: Any) -> Batches:
    knobs = {"tokenizer": folder, "packing": "whole", "sources": (str(store),), **knobs}
    return Batches(tiny.data(**knobs), context, 0, "train", load(folder))


@pytest.mark.parametrize("context", [28, 48, 500])
def test_each_dialogue_is_whole_and_there_once(
    store: Path, folder: str, context: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source, tokenizer = batches(store, folder, context).sources[0], load(folder)
    got = source.rows(np.arange(len(source)))
    found = []
    for row in range(len(source)):
        for segment in range(got.segments[row].max() + 1):
            inside = got.segments[row] == segment
            found.append((got.tokens[row][inside].tolist(), got.weights[row][inside].tolist()))
            assert got.positions[row][inside].tolist() == list(range(inside.sum()))
            assert (got.tokens[row][inside][1:] == got.targets[row][inside][:-1]).all()
        first, last = source.documents(np.array([row]))[0]
        assert last - first == got.segments[row].max()
    text = Store.open(store / "train", tokenizer)
    bounds = zip([0, *text.document_ends], text.document_ends, strict=False)
    every = [(text.tokens(a, b - 1).tolist(), text.weights(a + 1, b).tolist()) for a, b in bounds]
    fits = [talk for talk in every if len(talk[0]) <= context]
    assert found == fits and all(sum(weights) > 0 for _, weights in found)
    said = capsys.readouterr().err
    assert (f"{len(every) - len(fits)} of {len(every)} documents are left out" in said) == (
        len(fits) < len(every)
    )
    # No neighbour would have fitted into the row before.
    used = (got.segments >= 0).sum(1)
    assert all(a + (got.segments[i + 1] == 0).sum() > context for i, a in enumerate(used[:-1]))


def test_a_context_that_holds_no_dialogue_is_refused(store: Path, folder: str) -> None:
    with pytest.raises(
        UserError, match="each document of .* has more than model.context=4 targets"
    ):
        batches(store, folder, 4)


def test_what_is_scored_is_shown(store: Path, folder: str) -> None:
    source = batches(store, folder).sources[0]
    (text,) = describe(source.rows(np.array([0])), load(folder), "<{}>".format, str)
    assert text.startswith("<|im_start|>user\nthe") and "assistant\n<<|im_end|>>\n" in text
    (plain,) = describe(source.rows(np.array([0])), load(folder))
    assert plain.startswith("⟦<|im_start|>⟧⟦user\nthe") and "assistant\n⟧<|im_end|>⟦\n" in plain


# ---- a step of training


def knobs(folder: str, **more: Any) -> dict[str, Any]:
    return {
        "data__packing": "whole", "data__tokenizer": folder, "model__vocab_size": 344,
        "model__context": 48, "model__attention": "plain", "optim__z_loss": 1e-3, **more,
    }  # fmt: skip


def config(store: Path, folder: str, **more: Any) -> Any:
    return tiny.config(store, **knobs(folder, **more))


def gradient(c: Any, batch: Batch[np.ndarray]) -> tuple[np.ndarray, Any]:
    """The loss and the gradient of the objective's mean over all scored tokens, A micro-batches."""
    params = model.init(c.model, 0)
    A = c.train.accumulation
    whole = jax.tree.map(lambda x: jax.numpy.asarray(x).reshape(-1, A, x.shape[-1]), batch)
    objective = OBJECTIVE[c.train.objective]

    def totals(params: Any, micro: Any, key: Any, scale: Any) -> Any:
        sums = objective.totals(c, params, micro, None)
        return sums.objective * scale, sums

    scale, key = 1 / objective.weight(whole), jax.random.key(0)
    step = jax.jit(state._accumulate(totals, c.train.accumulation))
    grads, sums = step(params, whole, key, scale)
    return sums.metrics["loss"] / sums.weight, grads


def apart(packed: Batch[np.ndarray]) -> Batch[np.ndarray]:
    """The same dialogues, one a row."""
    rows = []
    T = packed.tokens.shape[1]
    fills = {"tokens": 0, "targets": 0, "weights": 0, "segments": -1, "positions": 0}
    for row in range(len(packed.tokens)):
        for segment in range(packed.segments[row].max() + 1):
            inside = np.flatnonzero(packed.segments[row] == segment)
            room = (0, T - len(inside))
            columns = {
                name: np.pad(getattr(packed, name)[row][inside], room, constant_values=fill)
                for name, fill in fills.items()
            }
            columns["segments"] = np.minimum(columns["segments"], 0)
            rows.append(columns)
    return Batch(**{name: np.stack([columns[name] for columns in rows]) for name in fills})


def test_packed_and_apart_together_and_one_by_one_are_the_same(store: Path, folder: str) -> None:
    """Sums over some 100 float32 terms of size 1, in another order: a few 1e-7."""
    source = batches(store, folder, 160).sources[0]
    packed = source.rows(np.arange(2))
    alone = apart(packed)
    count = len(alone.tokens)
    assert count >= 8 and alone.weights.sum() == packed.weights.sum()

    def result(batch: Batch[np.ndarray], micros: int) -> tuple[np.ndarray, Any]:
        c = config(store, folder, model__context=160, train__accumulation=micros)
        return gradient(c, batch)

    loss, grads = result(alone, 1)
    for other, other_grads in (result(alone, count), result(packed, 1), result(packed, 2)):
        assert abs(float(loss - other)) < 1e-6
        difference = jax.tree.map(lambda a, b: float(abs(a - b).max()), grads, other_grads)
        assert max(jax.tree.leaves(difference)) < 1e-6
    blind = packed._replace(segments=np.zeros_like(packed.segments))
    assert abs(float(loss - result(blind, 1)[0])) > 1e-4, "dialogues that see each other"
    mean_of_means = np.mean([float(gradient_of_row(result, alone, row)) for row in range(count)])
    assert abs(float(loss) - mean_of_means) > 1e-4, "a mean over rows, whatever they score"


def gradient_of_row(result: Any, batch: Batch[np.ndarray], row: int) -> np.ndarray:
    return result(jax.tree.map(lambda x: x[row : row + 1], batch), 1)[0]


def test_loss_and_gradient_are_those_of_transformers_with_what_is_not_scored_left_out(
    store: Path, folder: str, tmp_path: Path
) -> None:
    """Labels of -100 are not scored there; the mean is over all labels."""
    torch = pytest.importorskip("torch")
    from gptjax.interop import hf

    c = config(store, folder, optim__z_loss=0.0, model__position="learned")
    params = model.init(c.model, 0)
    hf.export(tmp_path / "model", c.model, params, folder, "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    nats, count = 0.0, 0
    text = Store.open(store / "train", load(folder))
    source = batches(store, folder).sources[0]
    for start, stop in source.bounds.tolist():
        ids = torch.tensor(text.tokens(start, stop - 1).astype(np.int64))[None]
        labels = ids.clone()
        labels[0, torch.tensor(text.weights(start, stop - 1)) == 0] = -100
        scored = int((labels[0, 1:] != -100).sum())
        loss = theirs(ids, labels=labels).loss * scored
        loss.backward()  # adds up
        nats += loss.item()
        count += scored
    batch = source.rows(np.arange(len(source)))
    mean, grads = gradient(c, batch)
    assert batch.weights.sum() == count
    assert float(mean) == pytest.approx(nats / count, abs=1e-5)
    assert nats / count > 1
    table = theirs.get_input_embeddings().weight.grad.numpy() / count
    ours = np.asarray(grads["embed"]["tokens"])[: len(table)]
    np.testing.assert_allclose(ours, table, rtol=0, atol=1e-5 * abs(table).max())


def test_a_batch_without_a_scored_token_changes_nothing_to_nan(store: Path, folder: str) -> None:
    c = config(store, folder)
    batch = batches(store, folder).rows(0, 0, 8)
    batch.weights[:] = 0
    whole = jax.tree.map(lambda x: x.reshape(8, 1, -1), batch)
    new, metrics = state.update(c, state.create(c), whole)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((new.params, metrics)))
    assert float(metrics["tokens"]) == 0


def test_held_out_dialogues_are_scored_by_their_weights(store: Path, folder: str) -> None:
    c, tokenizer = config(store, folder), load(folder)
    params = model.init(c.model, 0)
    with jax.set_mesh(tiny.mesh()):
        evaluator = RowEvaluator(c, Store.open(store / "val", tokenizer), tokenizer)
        advanced: list[int] = []
        score = evaluator(params, advanced.append)
    with jax.set_mesh(tiny.mesh(data=8)):
        spread = RowEvaluator(c, Store.open(store / "val", tokenizer), tokenizer)(params)
    assert spread == dataclasses.replace(score, nats=pytest.approx(score.nats, rel=1e-6))
    few = dataclasses.replace(c, eval=dataclasses.replace(c.eval, max_tokens=1))
    with jax.set_mesh(tiny.mesh()):
        assert RowEvaluator(few, Store.open(store / "val", tokenizer), tokenizer).tokens == 48
    batch = evaluator.rows.rows(np.arange(len(evaluator.rows)))
    loss, _ = gradient(dataclasses.replace(c, train=tiny.train(accumulation=1)), batch)
    assert score.tokens == batch.weights.sum() and sum(advanced) == evaluator.tokens
    assert score.loss == pytest.approx(float(loss), abs=1e-6)
    answers = [row["messages"][1]["content"] for row in rows(30)[24:] if len(row["messages"]) > 1]
    # A turn's end is a special token, whose bytes are those of its name; so it is counted.
    ends = len(answers) * int(tokenizer.bytes_per_token[2])
    assert score.bytes == sum(len(answer.encode()) for answer in answers) + ends


# ---- the commands


@pytest.mark.slow
def test_a_killed_run_resumes_bitwise(store: Path, folder: str, tmp_path: Path) -> None:
    of, whole, killed = knobs(folder), tmp_path / "whole", tmp_path / "killed"
    assert run(store, whole, **of).returncode == 0
    assert run(store, killed, at_step(17, SIGKILL), **of).returncode == -signal.SIGKILL
    resumed = run(store, killed, **of)
    assert resumed.returncode == 0 and "resumed at step 1" in resumed.stderr, resumed.stderr
    assert timeless(killed) == timeless(whole)
    assert bits(final_state(store, killed, **of)) == bits(final_state(store, whole, **of))


@pytest.mark.slow
def test_a_study_has_dialogues(store: Path, folder: str, tmp_path: Path) -> None:
    study = tiny.study(store, knobs=knobs(folder), seeds=1)
    base, arm = runner.run_study(study, tmp_path / "cells").outcomes
    assert base.status == arm.status == "finished"
    assert base.metric != arm.metric and np.isfinite([base.metric, arm.metric]).all()


@pytest.mark.slow
def test_a_model_is_taught_and_asked(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a model that has never seen a dialogue to one that has learned its only answer."""
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    prepare([tmp_path / "text.txt"], tmp_path / "text", folder, val_fraction=0.2)
    small = {"data__tokenizer": folder, "model__vocab_size": 344, "model__context": 48}
    base = tiny.overrides(tmp_path / "text", **small, train__steps=5)
    assert main(["train", f"--config={tiny.RECIPE}", f"--workdir={tmp_path / 'base'}", *base]) == 0
    assert main(["export", f"--workdir={tmp_path / 'base'}", f"--out={tmp_path / 'model'}"]) == 0
    assert load(str(tmp_path / "model")).chat_template == CHATML
    talks = [{"prompt": f"the {n}?", "completion": "the cat"} for n in range(40)]
    file = jsonl(tmp_path / "talks.jsonl", talks)
    words = ["data", "dialogues", str(file), f"--out={tmp_path / 'talks'}"]
    assert main([*words, f"--tokenizer={tmp_path / 'model'}"]) == 0

    def teach(name: str, *more: str) -> int:
        knobs = {
            "data__packing": "whole", "train__steps": 60, "train__checkpoint_every": 20,
            "optim__peak_lr": 1e-2, "train__eval_every": 30,
        }  # fmt: skip
        of = tiny.overrides(tmp_path / "talks", **knobs)
        of = [w for w in of if "model." not in w and "tokenizer" not in w]
        start = [f"--from={tmp_path / 'model'}", f"--config={tiny.RECIPE}"]
        return main(["train", *start, f"--workdir={tmp_path / name}", *of, *more])

    assert teach("taught") == 0
    said = capsys.readouterr().err
    assert "held-out" in said
    asked = ["ask", f"--workdir={tmp_path / 'taught'}", "the 7?", "--config.sample.temperature=0"]
    assert main(asked) == 0
    assert capsys.readouterr().out == "> the 7?\nthe cat\n"
    assert main(["replay", str(tmp_path / "taught"), f"--from={tmp_path / 'model'}"]) == 0
    shown = ["data", "show", f"--workdir={tmp_path / 'taught'}", "--rows=1"]
    assert main(shown) == 0
    assert "the cat<|im_end|>⟦" in capsys.readouterr().out
