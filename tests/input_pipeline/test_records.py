import dataclasses
import json
import shutil

import msgspec
import numpy as np
import pytest
import tensorflow as tf
from etils import epath

from grain_jax.core import errors
from grain_jax.input_pipeline import record_files, records, tokenizer
from tests import record_sets
from tests.record_sets import numbers, take

pytestmark = [pytest.mark.filterwarnings("ignore:label:DeprecationWarning"), pytest.mark.long]

CLIP = tokenizer.ClipTokenizer()
COUNT, LANES, BATCH = 43, 4, 8  # shards of unequal lengths


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    record_sets.write_annotations(folder / "in", COUNT, size=(16, 16))
    assert record_sets.build_set(folder / "in", folder, "--num-shards=9") == 0
    return folder


def tokens_of(texts):
    """Their ids, a tuple per text."""
    return [tuple(CLIP.encode([text], 77).ids.tolist()) for text in texts]


def text_ids(texts):
    return CLIP.encode(texts, 77).text_ids


def text_at(batch, group, row_and_end):
    """The token ids of a text, a tuple."""
    row, end = row_and_end
    inside = batch.text_segments[group, row] == batch.text_segments[group, row, end]
    return tuple(batch.text_tokens[group, row][inside].tolist())


def row_texts(batch, group_size):
    """(captions, descriptions) of each image, as tuples of token ids, read back from the layout."""
    kinds = (batch.caption_at, batch.caption_mask), (batch.description_at, batch.region_mask)
    return [
        tuple([text_at(batch, i // group_size, x) for x in ends[i][mask[i]]] for ends, mask in kinds)
        for i in range(len(batch.image))
    ]


def test_batches_hold_what_was_built(output):
    config = record_sets.config(output, synthetic_caption_rate=0.0)
    assert records.num_examples(config) == COUNT
    (batch,) = take(config, 1)
    assert batch.text_tokens.shape == (4, 4, 77) and batch.texts_dropped.tolist() == [0] * 4
    for row, number in enumerate(numbers(batch)):
        line = record_sets.annotation(number, (16, 16))
        np.testing.assert_array_equal(batch.image[row], record_sets.picture(number, (16, 16)))
        # The highest score, here the last in the file, comes first.
        regions = line["regions"][::-1]
        x1, y1, x2, y2 = np.array([r["box"] for r in regions]).reshape(-1, 4).T / 16
        expected = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1)
        mask = batch.region_mask[row]
        assert mask.sum() == len(regions)
        np.testing.assert_allclose(batch.region_boxes_cxcywh[row][mask], expected, atol=1e-6)
        assert not batch.region_boxes_cxcywh[row][~mask].any()
        (caption,), descriptions = row_texts(batch, 2)[row]
        webs = [line["caption"], *line["captions"]]
        ids = tokens_of(webs)
        assert caption in ids
        assert batch.caption_id[row, 0] in text_ids(webs)
        wanted = [r["description"] for r in regions]
        assert descriptions == tokens_of(wanted)
        np.testing.assert_array_equal(batch.description_id[row][mask], text_ids(wanted))


def _built_again(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "in" / "A.jsonl").write_text(text)
    assert record_sets.build_set(folder / "in", folder, "--num-shards=4") == 0
    return folder


@pytest.fixture(scope="module")
def with_gaps(tmp_path_factory):
    """(a set, its lines); some lack a web caption, a synthetic one or regions, that have 0 to 4 negatives."""
    folder = tmp_path_factory.mktemp("gaps")
    lines = record_sets.write_annotations(folder / "in", 16, size=(16, 16))
    for number, line in enumerate(lines):
        if number % 5 == 1:
            del line["caption"], line["captions"]
        if number % 5 == 2:
            line["synthetic_caption"] = ""
        for i, region in enumerate(line["regions"]):
            negatives = (len(line["regions"]) * 2 + i) % 5
            region["negatives"] = [f"the lower part {i} of {n}" for n in range(100, 100 + negatives)]
    return _built_again(folder, lines), lines


@pytest.mark.parametrize("captions,best", [(1, 2), (3, 1)])
def test_several_captions_of_an_image(with_gaps, captions, best):
    keys = dict(captions_per_image=captions, descriptions_in_captions=best, max_regions=2)
    keys |= dict(pack_rows=6, synthetic_caption_rate=1.0)
    config = record_sets.config(with_gaps[0], **keys)
    single = record_sets.config(with_gaps[0], synthetic_caption_rate=0.0)
    gaps = 0
    for batch, of_single in zip(take(config, 2), take(single, 2)):
        assert batch.caption_at.shape == (8, captions, 2)
        for row, (number, texts) in enumerate(zip(numbers(batch), row_texts(batch, 2))):
            line = record_sets.annotation(number, (16, 16))
            regions = [r["description"] for r in line["regions"]][::-1]
            synthetic = "" if number % 5 == 2 else line["synthetic_caption"]
            webs = [] if number % 5 == 1 else [line["caption"], *line["captions"]]
            # The web caption that a run with one caption draws.
            ids = text_ids(webs).tolist()
            web = webs[ids.index(of_single.caption_id[row, 0])] if webs else ""
            slots = [web, synthetic, ", ".join(regions[: best or None])][:captions]
            if captions == 1:
                slots = [", ".join([synthetic or web, *regions[:best]])]
            mask = batch.caption_mask[row]
            assert mask.tolist() == [bool(text) for text in slots]
            expected = [text for text in slots if text]
            assert texts[0] == tokens_of(expected)
            np.testing.assert_array_equal(batch.caption_id[row][mask], text_ids(expected))
            assert not batch.caption_id[row][~mask].any()
            assert not batch.caption_at[row][~mask].any()
            gaps += captions - len(expected)
        assert batch.text_counts[:, 0].sum() == batch.caption_mask.sum() + batch.region_mask.sum()
    assert captions == 1 or gaps > 2


def test_negatives_stay_with_their_regions(with_gaps):
    output, lines = with_gaps
    sizes = dict(max_regions=2, pack_rows=8)
    config = record_sets.config(output, negatives_per_region=3, **sizes)
    seen = {}
    for batch, plain in zip(take(config, 6), take(record_sets.config(output, **sizes), 6)):
        assert batch.negative_at.shape == (8, 2, 3, 2) and not batch.texts_dropped.any()
        for row, number in enumerate(numbers(batch)):
            regions = lines[number]["regions"][::-1][:2]  # the highest score first
            for r, region in enumerate(regions):
                mask = batch.negative_mask[row, r]
                ids = tokens_of(region["negatives"])
                assert mask.tolist() == [h < min(len(ids), 3) for h in range(3)]
                ends = batch.negative_at[row, r][mask]
                drawn = [ids.index(text_at(batch, row // 2, end)) for end in ends]
                if drawn:  # they follow each other, the first after the last
                    follow = (drawn[0] + np.arange(len(drawn))) % len(ids)
                    assert drawn == follow.tolist()
                    seen.setdefault((number, r), set()).add(drawn[0])
            assert not batch.negative_mask[row, len(regions) :].any()
        assert plain.negative_at is None and plain.negative_mask is None
        for name in ("image", "caption_id", "description_id", "region_boxes_cxcywh"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(plain, name))
    assert max(map(len, seen.values())) > 1  # another draw at another visit

    cropped = record_sets.config(output, negatives_per_region=3, crop_min_area=0.1, pack_rows=8)
    lost = 0
    for batch in take(cropped, 4):
        assert not batch.negative_mask[~batch.region_mask].any()
        lost += int((batch.region_mask.sum(axis=1) < numbers(batch) % 4).sum())
    assert lost


def test_a_set_without_negatives_is_said(output, caplog):
    config = record_sets.config(output, negatives_per_region=2)
    records.check(config)
    got = "input.negatives_per_region=2: no region of 'tiny_set' has negatives"
    assert [record.getMessage() for record in caplog.records] == [got]
    (batch,) = take(config, 1)
    assert batch.negative_mask.shape == (8, 5, 2) and not batch.negative_mask.any()
    loss = dataclasses.replace(config.loss, hard_negative=0.5)
    with pytest.raises(record_files.DataError, match=f"{got}, which loss.hard_negative=0.5 needs"):
        records.check(dataclasses.replace(config, loss=loss))


def test_an_image_whose_texts_mention_a_side_is_not_mirrored(tmp_path):
    lines = record_sets.write_annotations(tmp_path / "in", 8, size=(16, 16))
    lines[1]["caption"] = "He left the room, all right"
    lines[2]["synthetic_caption"] = "a bird that turns to the Left"
    lines[3]["regions"][0]["description"] = "its right wing"
    _built_again(tmp_path, lines)
    (plain,) = take(record_sets.config(tmp_path, max_regions=3), 1)
    (mirrored,) = take(record_sets.config(tmp_path, max_regions=3, flip_rate=1.0), 1)
    for row, number in enumerate(numbers(plain)):
        step = 1 if number in (1, 2, 3) else -1
        np.testing.assert_array_equal(mirrored.image[row], plain.image[row, :, ::step])
        boxes, mask = plain.region_boxes_cxcywh[row], plain.region_mask[row]
        expected = boxes if step == 1 else boxes * [-1, 1, 1, 1] + [1, 0, 0, 0]
        got = mirrored.region_boxes_cxcywh[row]
        np.testing.assert_allclose(got[mask], expected[mask], atol=1e-6)
    np.testing.assert_array_equal(mirrored.description_id, plain.description_id)
    np.testing.assert_array_equal(mirrored.caption_id, plain.caption_id)


def test_a_missing_set_names_the_command(tmp_path):
    config = record_sets.config(tmp_path, name="birds")
    with pytest.raises(errors.MissingData) as error:
        records.batches(config)
    message = str(error.value)
    assert "\n" not in message and f"{tmp_path}/birds/1.0.0" in message
    assert "grain-jax build " in message and f" --output {tmp_path} --name birds" in message
    (tmp_path / "bird/1.0.0").mkdir(parents=True)
    (tmp_path / "bird/1.0.0/dataset_info.json").touch()
    with pytest.raises(errors.MissingData, match=f"'birds' in '{tmp_path}'; did you mean bird. "):
        records.batches(config)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    record_sets.write_annotations(folder / "in", 12, size=(16, 16))
    assert record_sets.build_set(folder / "in", folder, "--num-shards=2") == 0
    return folder / "tiny_set"


@pytest.fixture
def damaged(small, tmp_path):
    shutil.copytree(small, tmp_path / "tiny_set")
    config = record_sets.config(tmp_path, batch_size=4, lanes=2)
    (record_set,) = record_files.find(config)
    path = record_set.shards[1].path
    contents = [r.numpy() for r in tf.data.TFRecordDataset(path)]
    return config, path, contents


def _flip_a_bit(path, contents):
    whole = epath.Path(path).read_bytes()
    byte = whole.index(contents[3]) + 40
    epath.Path(path).write_bytes(whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :])


def _cut_picture(path, contents):
    example = tf.train.Example.FromString(contents[4])
    picture = example.features.feature["image"].bytes_list
    picture.value[0] = picture.value[0][:50]
    contents[4] = example.SerializeToString()
    record_sets.write_shard(path, contents)
    folder = epath.Path(path).parent  # the set was built with this fault
    digest = record_files.digest_of_split(sorted(folder.glob("*tfrecord*")), False)
    (folder / record_files.DIGEST_FILE).write_bytes(msgspec.json.encode({"train": digest}))


def _change_a_text(path, contents):
    record_sets.write_shard(path, [*contents[:-1], contents[-1].replace(b"text", b"TEXT")])


def _digest_file(content):
    return lambda path, of: (epath.Path(path).parent / "digest.json").write_text(content)


DAMAGES = {
    "a bit": (_flip_a_bit, "{path}, record 3: damaged (checksum); rebuild the set with grain-jax build"),
    "a picture": (_cut_picture, "{path}, record 4: "),
    "other content": (_change_a_text, "{path}: not the records that grain-jax build wrote (digest.json)"),
    "too few": (lambda path, of: record_sets.write_shard(path, of[:-1]), "{path}: got "),
    "a shard": (lambda path, of: epath.Path(path).unlink(), "{path}: the shard is gone; rebuild the set"),
    "no digests": (_digest_file('{"train": 3}'), "{folder}/digest.json: Expected `object`, got `int`"),
    "another split": (_digest_file("{}"), "{folder} has no split 'train'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(damaged, kind):
    config, path, contents = damaged
    damage, message = DAMAGES[kind]
    damage(path, contents)
    with pytest.raises(record_files.DataError) as error:
        if kind not in ("a bit", "a picture", "other content"):
            records.check(config)  # before anything is compiled
        take(config, 3)
    said = str(error.value)
    assert said.startswith(message.format(path=path, folder=epath.Path(path).parent))
    assert "\n" not in said and (kind != "a picture" or "PNG" in said)
