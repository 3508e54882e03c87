"""Prompt sets from small files in the formats of published benchmarks."""

import json
import random
import re
from pathlib import Path

import pytest

from noiseopt import shapes_world
from noiseopt.evaluation.prompt_sets import Prompt, PromptSet, load_prompts

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "cow", "count": 2}],
        "exclude": [{"class": "cow", "count": 3}],
        "prompt": "a photo of two cows",
    },
]
GENEVAL_2 = [
    {"prompt": "two toys", "atom_count": 2, "vqa_list": [["How many toys?", "two"]], "skills": ["count"]},
    {"prompt": "a pig", "atom_count": 1, "vqa_list": [["Is there a pig?", "Yes"]], "skills": ["object"]},
]
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts\n"
    '"GIGGLE" painted on a wall. \tIllustrations\tWriting & Symbols\t\n'
)
SIMPLE = {
    "animals": [{"prompt": "a dog and a frog", "indices": [2, 5]}],
    "objects": [{"prompt": "a pink crown and a purple bow", "indices": [3, 7]}],
}
DRAWBENCH = (
    'Prompts,Category\nA red car.,Colors\n"A sign that says ""Hello, World"".",Text\n\n"Two lines\nof text",Text\n'
)
COCO = {
    "info": {},
    "images": [{"id": 7}, {"id": 8}],
    "annotations": [
        {"image_id": 8, "id": 1, "caption": "A bicycle with a clock as the front wheel."},
        {"image_id": 7, "id": 2, "caption": "A room with blue walls. \n"},
        {"image_id": 8, "id": 3, "caption": "A black Honda motorcycle."},
    ],
}


def lines(*objects: dict) -> str:
    return "\n".join(map(json.dumps, objects)) + "\n"


def pairs(prompts: PromptSet) -> list[tuple[str, str | None]]:
    return [(prompt.text, prompt.category) for prompt in prompts.prompts]


@pytest.mark.parametrize(
    ("name", "content", "format", "expected"),
    [
        ("mine.txt", "a red fox\n\n  an owl \r\n", "text", [("a red fox", None), ("an owl", None)]),
        ("mine.txt", "[V] dog\n{x}", "text", [("[V] dog", None), ("{x}", None)]),
        ("mine", "Prompted by nothing", "text", [("Prompted by nothing", None)]),
        ("color_val.txt", "a green bench\r\n", "t2i-compbench", [("a green bench", "color")]),
        ("3d_spatial.txt", "a cat behind a boy\n", "t2i-compbench", [("a cat behind a boy", "3d_spatial")]),
        ("non_spatial_train.txt", "a man runs", "t2i-compbench", [("a man runs", "non_spatial")]),
        ("complex_val_action.txt", "The cat slept.\n", "t2i-compbench", [("The cat slept.", "complex")]),
        ("evaluation_metadata.jsonl", lines(*GENEVAL), "geneval",
         [("a photo of a bench", "single_object"), ("a photo of two cows", "counting")]),
        ("geneval2_data.jsonl", lines(*GENEVAL_2), "geneval", [("two toys", "2 atoms"), ("a pig", "1 atoms")]),
        ("one.jsonl", lines(GENEVAL[0]), "geneval", [("a photo of a bench", "single_object")]),
        ("mine.jsonl", lines({"prompt": "a", "category": "x"}, {"text": "b", "tag": "y"}, {"caption": "c"}), "jsonl",
         [("a", "x"), ("b", "y"), ("c", None)]),
        ("PartiPrompts.tsv", PARTI, "partiprompts",
         [("bond", "Abstract"), ('"GIGGLE" painted on a wall.', "Illustrations")]),
        ("simple_cases.json", json.dumps(SIMPLE), "noise-diffusion",
         [("a dog and a frog", "animals"), ("a pink crown and a purple bow", "objects")]),
        ("complex_cases.json", json.dumps(SIMPLE["animals"]), "noise-diffusion", [("a dog and a frog", None)]),
        ("DrawBench.csv", DRAWBENCH, "table",
         [("A red car.", "Colors"), ('A sign that says "Hello, World".', "Text"), ("Two lines\nof text", "Text")]),
        ("DrawBench.txt", DRAWBENCH.replace("\n", "\r\n", 2), "table",
         [("A red car.", "Colors"), ('A sign that says "Hello, World".', "Text"), ("Two lines\nof text", "Text")]),
        ("mine.tsv", 'id\tprompt\n7\ta\n8\t"Hi" on a wall\n', "table", [("a", None), ('"Hi" on a wall', None)]),
        ("mine.tsv", 'tag\tCaption\nx\t"a ""b"" c"\n', "table", [('a "b" c', "x")]),
        ("mine.csv", "prompt\na cat\n", "table", [("a cat", None)]),
        ("mine.csv", "text;category\na cat, sitting;x\n", "table", [("a cat, sitting", "x")]),
        ("mine", "id\tprompt\n7\ta cat\n", "table", [("a cat", None)]),
        ("mine.txt", "caption, photo\nprompt\n", "text", [("caption, photo", None), ("prompt", None)]),
        ("mine.txt", "a - b\n- c\n", "text", [("a - b", None), ("- c", None)]),
        ("mine.txt", "<sks> dog\n<cat-toy>", "text", [("<sks> dog", None), ("<cat-toy>", None)]),
        ("hpdv4.json", json.dumps({"0001": "a cat", "0002": "a dog"}), "json", [("a cat", None), ("a dog", None)]),
        ("hpsv2.json", json.dumps(["a cat", "a dog"]), "json", [("a cat", None), ("a dog", None)]),
        ("mjhq.json", json.dumps({"f0": {"category": "food", "prompt": "a pie"}}), "json", [("a pie", "food")]),
        ("mine.json", json.dumps({"name": "mine", "prompts": ["a cat"]}), "json", [("a cat", None)]),
        ("one.txt", lines({"prompt": "a", "category": "a"}), "jsonl", [("a", "a")]),
        ("mine.csv", "prompt,category\na cat,\x1b[31mred\n", "table", [("a cat", r"\x1b[31mred")]),  # for terminals
        ("strings.jsonl", '"a cat"\n"a dog"\n', "jsonl", [("a cat", None), ("a dog", None)]),
        ("captions_val2014.json", json.dumps(COCO), "coco",
         [("A bicycle with a clock as the front wheel.", None), ("A room with blue walls.", None)]),
        ("captions_val2014.json", json.dumps(COCO, indent=1), "coco",
         [("A bicycle with a clock as the front wheel.", None), ("A room with blue walls.", None)]),
    ],
)  # fmt: skip
def test_layouts_are_read_by_name_and_by_their_looks(tmp_path, name, content, format, expected):
    path = tmp_path / name
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(content.encode(encoding))
        assert pairs(load_prompts(str(path))) == expected
        assert pairs(load_prompts(str(path), format)) == expected
    assert load_prompts(str(path)).name == path.stem
    assert load_prompts(str(path), limit=1).prompts == load_prompts(str(path)).prompts[:1]


def first(path: Path, content: str) -> Prompt:
    path.write_text(content, encoding="utf-8")
    return load_prompts(str(path)).prompts[0]


def test_what_else_is_known_is_metadata(tmp_path):
    assert first(tmp_path / "a.jsonl", lines(GENEVAL[1])).metadata == {
        key: GENEVAL[1][key] for key in ("include", "exclude")
    }
    assert first(tmp_path / "b.jsonl", lines(GENEVAL_2[0])).metadata["skills"] == ["count"]
    assert first(tmp_path / "c.tsv", PARTI).metadata == {"challenge": "Basic", "note": "Biology-inspired concepts"}
    assert first(tmp_path / "d.json", json.dumps(SIMPLE)).metadata == {"indices": [2, 5]}
    assert first(tmp_path / "e.json", json.dumps(COCO)).metadata == {"image_id": 8, "id": 1}
    assert first(tmp_path / "f.txt", "a cat").metadata == {}
    assert first(tmp_path / "g.csv", "id,prompt\n7,a cat\n").metadata == {"id": "7"}
    assert first(tmp_path / "h.json", '{"0001": "a cat"}').metadata == {"id": "0001"}


@pytest.mark.parametrize(
    ("name", "content", "where", "problems"),
    [
        ("mine.txt", "a\n\nb\n", ["mine.txt:1", "mine.txt:3"], []),
        ("mine.csv", DRAWBENCH + "a, b,Colors\n,Colors\nlast,Colors\n",
         ["mine.csv:2", "mine.csv:3", "mine.csv:5", "mine.csv:9"],
         ["Expected 2 cells in .*mine.csv:7, but got 3. .*quotation marks",
          "in .*mine.csv:8, but got the keys 'category'"]),
        ("mine.jsonl", '{"prompt": "a"}\n\nb c\n{"prompt": "d"}\n["e"]\n{"promt": "b", "id": 3}\n{"prompt": " "}\n',
         ["mine.jsonl:1", "mine.jsonl:4"],
         ["Expected JSON in .*mine.jsonl:3, but got 'b c': ", r"an object in .*mine.jsonl:5, but got \['e'\]",
          "'prompt', 'text', 'caption' in .*mine.jsonl:6, but got the keys 'promt', 'id'",
          "mine.jsonl:7, but it is blank"]),
        ("mine.json", '["a", "", 3, "b"]', ["mine.json, item 1", "mine.json, item 4"],
         ["mine.json, item 2, but it is blank", "Expected an object in .*mine.json, item 3, but got 3"]),
        ("mine.jsonl", '{"prompt": "a"}\n{"prompt": 5}\n', ["mine.jsonl:1"],
         ["mine.jsonl:2, but got 5 under 'prompt'"]),
        ("mine.json", '{"x": "a", "y": " "}', ["mine.json, 'x'"], ["mine.json, 'y', but it is blank"]),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_named_with_its_line_and_the_others_are_read(tmp_path, name, content, where, problems):
    (tmp_path / name).write_text(content)
    found = load_prompts(str(tmp_path / name))
    assert [prompt.where for prompt in found.prompts] == [f"{tmp_path}/{place}" for place in where]
    for problem, expected in zip(found.problems, problems, strict=True):
        assert re.search(expected, problem)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("mine.txt", [b"a cat", b"Dal\xed", b"a dog"]),
        ("mine.csv", [b"prompt,category", b"a cat,x", b"a caf\xe9,x", b"a dog,x"]),
        ("mine.jsonl", [b'{"prompt": "a cat"}', b'{"prompt": "a caf\xe9"}', b'{"prompt": "a dog"}']),
    ],
)
def test_bytes_that_are_not_utf_8_are_named_with_their_line(tmp_path, name, lines):
    (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
    found = load_prompts(str(tmp_path / name))
    assert [prompt.text for prompt in found.prompts] == ["a cat", "a dog"]
    (problem,) = found.problems
    assert re.fullmatch(rf"Expected UTF-8 text in .*{name}:{len(lines) - 1}, but got .* Convert the line.*", problem)
    problem.encode()


def test_a_limit_leaves_out_the_problems_after_it(tmp_path):
    (tmp_path / "mine.jsonl").write_text('["x"]\n{"prompt": "a"}\n["y"]\n{"prompt": "b"}\n["z"]\n')
    counts = {}
    for limit in (1, 2, 3, None):
        found = load_prompts(str(tmp_path / "mine.jsonl"), limit=limit)
        counts[limit] = (len(found.prompts), len(found.problems))
    assert counts == {1: (1, 1), 2: (2, 2), 3: (2, 3), None: (2, 3)}


def test_a_blank_caption_is_passed_over_for_the_next_of_its_image(tmp_path):
    blank = [{"image_id": 8, "caption": " "}, {"image_id": 9, "caption": ""}, *COCO["annotations"]]
    (tmp_path / "captions.json").write_text(json.dumps({**COCO, "annotations": blank}))
    found = load_prompts(str(tmp_path / "captions.json"))
    assert pairs(found) == [("A bicycle with a clock as the front wheel.", None), ("A room with blue walls.", None)]
    assert ["annotation 1, but it is blank" in found.problems[0], "annotation 2" in found.problems[1]] == [True] * 2


def test_a_file_of_another_name_is_its_own_category(tmp_path):
    path = tmp_path / "toys.txt"
    path.write_text("a toy\n")
    assert pairs(load_prompts(str(path), "t2i-compbench")) == [("a toy", "toys")]


def test_unusual_characters_do_not_end_a_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "Dalí\u2028at night"}, ensure_ascii=False), encoding="utf-8")
    assert load_prompts(str(path)).prompts == (Prompt("Dalí\u2028at night"),)


@pytest.mark.parametrize(
    ("split", "texts"),
    [
        ("train", shapes_world.TRAIN_PROMPTS),
        ("validation", shapes_world.VALIDATION_PROMPTS),
        ("held-out", shapes_world.HELD_OUT_PROMPTS),
    ],
)
def test_splits_of_the_shapes_world(split, texts):
    prompts = load_prompts(split)
    assert prompts.name == split
    assert pairs(prompts) == [(text, shapes_world.category(text)) for text in texts]
    assert load_prompts(split, limit=7).prompts == prompts.prompts[:7]


def test_prompts_can_be_keys():
    assert len({Prompt("a", "x", {"n": 1}), Prompt("a", "x", {"n": 1}), Prompt("a", "y")}) == 2


@pytest.mark.parametrize(
    ("name", "content", "format", "message"),
    [
        ("mine.txt", " \n\n", None, "Expected prompts in .*mine.txt, but got none"),
        ("mine.jsonl", "", None, "but got none"),
        ("mine.jsonl", 'b c\n{"promt": "b"}\n', None, "Expected JSON in .*mine.jsonl:1, but .*None of 2 entries"),
        ("mine.jsonl", '{"prompt": ["a"]}', "jsonl", "Expected a text under 'prompt'"),
        ("mine.jsonl", '{"prompt": "a"}', "geneval", "`tag` or an `atom_count` in .*mine.jsonl:1, .* keys 'prompt'"),
        ("mine.tsv", "Text\tCategory\na\tb\n", "partiprompts", "'Prompt' in .*mine.tsv, but got 'Text', 'Category'"),
        ("mine.tsv", "Prompt\tCategory\n\tc\n", None, "mine.tsv:2, but got the keys 'category'"),
        ("mine.tsv", "a\tb\n", None, r"a column out of 'prompt', .* in the first line of .*mine.tsv, but got 'a\\tb'"),
        ("mine.csv", "a cat\na dog\n", None, "first line of .*mine.csv, but got 'a cat'. Name the column"),
        ("mine.csv", 'prompt,x\na,b\n"c" d,e\n', None, "around whole cells in .*mine.csv:3, but got"),
        ("mine.txt", "a\tb\nc\td\n", None, r"in .*mine.txt, but got cells between tabs: 'a\\tb'. Name"),
        ("mine.txt", "- a cat\n- a dog\n", None, "but got list markers: '- a cat'. Remove"),
        ("mine.txt", "1. a cat\n2. a dog\n", None, "but got list markers"),
        ("mine.txt", "prompt: a cat\nprompt: a dog\n", None, "but got keys"),
        ("mine.txt", '"a cat",\n"a dog"\n', None, "but got the items of a list"),
        ("mine.txt", '<?xml version="1.0"?>\n<a/>\n', None, "JSON lines, but .*mine.txt starts with '<.xml"),
        ("mine.txt", "---\na: b\n", None, "starts with '---'"),
        ("mine.txt", "a\0b\n", None, "starts with"),
        ("mine.txt", '[\n"a cat"\n', None, "Expected JSON in .*mine.txt:3"),
        ("mine.yaml", "a cat\n", None, "CSV or TSV .*, but got .*mine.yaml. Export"),
        ("mine.parquet", "PAR1", None, "but got .*mine.parquet. Export"),
        ("mine.json", "a cat\n", None, "Expected JSON in .*mine.json:1"),
        ("mine.json", '{"prompts": 3, "x": "a"}', None, "Expected a list in .*mine.json, 'prompts', but got 3"),
        ("mine.json", '{"animals": [{"indices": [2, 5]}]}', None, "'animals', item 1, but got the keys 'indices'"),
        ("mine.json", '{"animals": 3}', None, "Expected a list in .*mine.json, 'animals', but got 3"),
        ("mine.json", '{\n"animals": [\n}', "noise-diffusion", "Expected JSON in .*mine.json:3"),
        ("mine.json", "[" * 200_000, "coco", "Expected JSON in .*mine.json:1, but it cannot be read"),
        ("mine.json", "1" * 10_000, "noise-diffusion", "Expected JSON in .*mine.json:1, but it cannot be read"),
        ("mine.json", '{"images": []}', "coco", "`annotations` in .*mine.json, but got the keys 'images'"),
        ("mine.json", '{"annotations": [{"id": 1}]}', None, "annotation 1, but got the keys 'id'"),
    ],
)  # fmt: skip
def test_broken_files_are_refused(tmp_path, name, content, format, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(str(path), format)


@pytest.mark.parametrize(
    ("count", "seed"), [(400, 0), pytest.param(5_000, 1, marks=pytest.mark.slow)], ids=["fast", "slow"]
)
def test_damaged_files_give_prompts_or_a_sentence(count, seed, tmp_path):
    """Files of every format, cut, with bytes changed or parts of others put in, under any of the names."""
    names = ["a.txt", "a", "a.csv", "a.tsv", "a.json", "a.jsonl", "color_val.txt"]
    contents = [lines(*GENEVAL), lines(*GENEVAL_2), PARTI, DRAWBENCH, json.dumps(SIMPLE), json.dumps(COCO, indent=1)]
    contents += ['{"1": "a", "2": "b"}', '["a", {"prompt": "b"}]', "a red fox\n\nan owl\n", 'id\tprompt\n1\t"a\tb\n']
    chance, refused, read = random.Random(seed), [], 0
    for _ in range(count):
        data = bytearray(chance.choice(contents).encode())
        for _ in range(chance.randrange(4)):
            place = chance.randrange(len(data) + 1)
            other = chance.choice(contents).encode()
            piece = other[chance.randrange(len(other)) :][: chance.randrange(30)]
            swapped = chance.choice(
                [bytes([chance.randrange(256)]), piece, b"", b'"', b"\n", b"\t", b"[", b"}", b"null"]
            )
            data[place : place + chance.choice([0, 1, 1, 5])] = swapped
        path = tmp_path / chance.choice(names)
        path.write_bytes(data[: chance.choice([len(data), chance.randrange(len(data) + 1)])])
        try:
            found = load_prompts(str(path))
        except ValueError as error:
            refused.append((str(path), str(error)))
        else:
            assert found.prompts and all(prompt.text.strip() and prompt.where for prompt in found.prompts)
            assert all(str(path) in problem for problem in found.problems)
            read += 1
    assert all(path in message and len(message) < 600 for path, message in refused)
    assert 0.2 * count < read < count


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="'train', 'validation', 'held-out' or a file of prompts, but got .*nothing.txt"
    ):
        load_prompts(str(tmp_path / "nothing.txt"))
    with pytest.raises(ValueError, match="'coco', but got 'csv'"):
        load_prompts("validation", "csv")
    with pytest.raises(ValueError, match="no format for the split 'train'"):
        load_prompts("train", "text")
    with pytest.raises(ValueError, match="limit of 1 prompt or more, but got 0"):
        load_prompts("train", limit=0)
    with pytest.raises(ValueError, match="which is a folder. Pass a file in it"):
        load_prompts(str(tmp_path))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Dalí".encode("latin-1"))
    with pytest.raises(ValueError, match="Expected UTF-8 text in .*latin.txt"):
        load_prompts(str(latin))
