"""Guards of protoquant.editing: whatever was done, undone and done again, the state is that of a model made afresh."""
import json
import warnings
from unittest import mock
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from protoquant import backbones, editing as E
from protoquant.codebook import Codebook
from protoquant.core import ConfigError, DataError, StoreError, WeightsError
from protoquant.features import Tokens
from protoquant.head import NonNegLinear, presence
from protoquant.model import ProtoQuant
from protoquant.pruning import physical_prune
from test_codebook import KINDS
from pieces import Images, book, gen, labelled, randn

K, M, D = 4, 12, 12


@pytest.fixture(scope="module")
def net():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return backbones.create("test_resnet", "random", num_classes=K, img_size=64)


class Net(torch.nn.Module):
    "A backbone by its name only: edits need no more."
    d, hash, name, size, mean, std, grid = D, "hash", "none", (64, 64), (0, 0, 0), (1, 1, 1), (3, 3)


def model(kind="plain", silent=0, T=.1, seed=0, m=M):
    h = NonNegLinear(K, m, gen(seed), .2, 1.)
    return ProtoQuant(Net(), book(m, D, kind, silent, seed), h, T)


def images(seed=0, n=6): return labelled(K, n, 3, D, seed)


def slow_presence(tokens, b, T):
    "Eq. 6 and 8 in double precision."
    z = tokens.read(slice(None)).double() - b.space.center.double()
    if b.space.basis.shape[1]: z = z @ b.space.basis.double()
    z = z / (z.norm(dim=-1, keepdim=True) + 1e-6 + float(b.space.damping))
    return ((z @ b.directions().double().T) / T).softmax(-1)[..., :len(b)].amax(1)


def edits(m=M):
    code = st.integers(0, m - 1)
    many, variant = st.lists(code, min_size=1, max_size=4, unique=True), st.sampled_from(E.VARIANTS)
    return st.one_of(st.builds(lambda c, v: dict(op="off", codes=c, variant=v), many, variant), st.builds(lambda c: dict(op="on", codes=c), many),
                     st.builds(lambda c, k, v: {"op": "weight", "code": c, "class": k, "value": v}, code, st.integers(0, K - 1), st.floats(0, 3)),
                     st.builds(lambda c, v: dict(op="merge", codes=c, variant=v), st.lists(code, min_size=2, max_size=3, unique=True), variant),
                     st.sampled_from(["undo", "redo"]))


def follow(editor, steps):
    "Do what can be done; the list that is in force afterwards."
    for s in steps:
        try: getattr(editor, s)() if isinstance(s, str) else editor.apply(s)
        except ConfigError: pass
    return list(editor.done)


def same(a, b):
    assert torch.equal(a._sum, b._sum) and torch.equal(a.presence, b.presence) and torch.equal(a.weight, b.weight) and a.off == b.off
    assert torch.equal(a.predictions, b.predictions)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(edits(), max_size=12), kind=st.sampled_from(KINDS), silent=st.integers(0, 2), many=st.sampled_from((1/8, 1/4, 1.)))
def test_any_sequence_is_what_its_list_gives_on_a_fresh_model_to_the_last_bit(steps, kind, silent, many):
    m, t = model(kind, silent), images()
    with mock.patch.object(E, "MANY", many), mock.patch.object(E, "LOSSY", 2 * many):
        editor = E.Editor(m, t)
        done = follow(editor, steps)
        fresh = E.Editor(m, t)
        for e in done: fresh.apply(e)
        same(editor, fresh)
        for _ in done: editor.undo()
        same(editor, E.Editor(m, t))
        for _ in done: editor.redo()
        same(editor, fresh)
    assert editor.done == done


def test_directions_are_kept_in_memory_while_there_is_room(monkeypatch):
    m, t = model(), images()
    assert E.Survey(t, m.book, .1).kept is not None
    need = len(t) * 9 * m.book.space.rank * 4 + len(t) * (14 * M + 24 * 9)
    for budget, kept in ((need, True), (need - 1, False)):
        monkeypatch.setattr(E, "BUDGET", budget)
        s = E.Editor(m, t).switch_off([1], "softmax")
        assert (s.survey.kept is not None) == kept and (s.nbytes <= budget + 2048 or not kept)


def test_many_codes_at_once_are_not_counted_one_by_one():
    m, t = model(m=64), images()
    editor = E.Editor(m, t)
    with mock.patch.object(E.Survey, "shares", side_effect=AssertionError("a product for each code")):
        editor.switch_off(list(range(40)), "softmax")
        editor.switch_off(40, "softmax").undo().undo()
    same(editor, E.Editor(m, t))
    want = slow_presence(t, editor.switch_off([3, 9], "softmax").edited().book, .1)
    torch.testing.assert_close(editor.presence[:, [c for c in range(64) if c not in (3, 9)]].double(), want, atol=2e-5, rtol=2e-5)
    both = E.Editor(m, t).switch_off([3, 9], "softmax").switch_off(list(range(10, 40)), "softmax").undo()      # what was counted before is still right
    same(both, editor)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(edits(), max_size=8), kind=st.sampled_from(KINDS), silent=st.integers(0, 2), T=st.sampled_from((.05, .1, .5)), share=st.sampled_from((1e-4, .01, .3)),
       many=st.sampled_from((1/8, 1.)))
def test_logits_are_those_of_the_edited_model(steps, kind, silent, T, share, many):
    m, t = model(kind, silent, T), images()
    editor = E.Editor(m, t, share=share)
    with mock.patch.object(E, "MANY", many), mock.patch.object(E, "LOSSY", 2 * many): follow(editor, steps)
    new = editor.edited()
    want = slow_presence(t, new.book, T) @ new.weight.double().T
    torch.testing.assert_close(editor.logits.double(), want, atol=2e-5, rtol=2e-5)
    assert editor.accuracy == pytest.approx(100 * float((editor.logits.argmax(1) == t.labels).double().mean()))
    if new.weight.any():
        small = editor.edited(physical=True)
        torch.testing.assert_close(slow_presence(t, small.book, T) @ small.weight.double().T, want, atol=2e-5, rtol=2e-5)
        assert len(small.edits["codes"]) == len(small.book) <= len(new.book)


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_variants_are_the_two_physical_prunings(kind):
    m, t, gone = model(kind, silent=1), images(), [1, 4, 7]
    h = NonNegLinear.of(m.weight)
    h.mask[:, gone] = False
    h.raw.data[:, [c for c in range(M) if c not in gone]] += .01     # every other code stays active
    m = ProtoQuant(Net(), m.book, NonNegLinear.of(h.raw.detach().clamp_min(0)), .1)
    for variant, exact in (("weight", True), ("softmax", False)):
        b, head, keep = physical_prune(m.book, h, exact=exact)
        want = presence(t.read(slice(None)), b, .1) @ head.weight.detach().T
        editor = E.Editor(m, t).switch_off(gone, variant)
        torch.testing.assert_close(editor.logits, want, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(E.Editor(m, t).switch_off(gone).logits, E.Editor(m, t).switch_off(gone, "softmax").logits, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(removed=st.lists(st.integers(0, M - 1), min_size=1, max_size=M - 1, unique=True).map(sorted), kind=st.sampled_from(KINDS), silent=st.integers(0, 2),
       T=st.sampled_from((.02, .1, 1.)), keep=st.sampled_from((0, 1 << 30)), share=st.sampled_from((0., 1e-3, .01, .5)), seed=st.integers(0, 9))
def test_presence_without_codes_is_that_of_the_smaller_codebook(removed, kind, silent, T, keep, share, seed):
    t, b = images(seed), book(M, D, kind, silent, seed)
    s = E.Survey(t, b, T, share=share, keep=keep, chunk=4 * 9 * M * 5)
    left = [c for c in range(M) if c not in removed]
    assert torch.equal(rho := sum(s.shares(c) for c in removed), s.shares(removed[::-1]))
    with mock.patch.object(E, "LOSSY", 2): got = s.without(removed, rho)      # never afresh
    again = s.afresh(removed)
    assert torch.equal(s.without(removed, rho), again if s._lossy(rho.double() / E.ONE).double().mean() > E.LOSSY else got)
    want = slow_presence(t, Codebook(b.codes.detach()[left], b.space, b.silent), T)
    torch.testing.assert_close(got[:, left].double(), want, atol=2e-6 / T, rtol=2e-5)
    torch.testing.assert_close(again[:, left].double(), want, atol=2e-6 / T, rtol=2e-5)
    assert not got[:, removed].any() and not again[:, removed].any() and torch.equal(s.without([], torch.zeros_like(s.lse, dtype=torch.int64)), s.s)


def test_near_ties_that_change_their_token_are_found(monkeypatch):
    "Two or three tokens of nearly the same presence, of which the removed code had a different share each."
    monkeypatch.setattr(E, "LOSSY", 2)                        # never afresh
    rng, z = gen(5), []
    for gap in (0, 1e-4, 1e-3, .01, .05, .3):
        for _ in range(8):
            a, r = torch.randn(2, D, generator=rng)
            z.append(torch.stack([a + r * x for x in torch.rand(9, generator=rng) * (.2 + gap)]))
    t = Tokens(torch.stack(z), torch.zeros(len(z), dtype=torch.long), (3, 3))
    b = Codebook(torch.cat([torch.stack(z)[::4, 0], torch.randn(6, D, generator=rng)]))
    for T in (.1, .5):
        s = E.Survey(t, b, T)
        moved = 0
        for r in range(len(b)):
            left = [c for c in range(len(b)) if c != r]
            got, want = s.without([r], s.shares(r))[:, left], slow_presence(t, Codebook(b.codes.detach()[left]), T)
            torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
            u = b.space.damped(t.read(slice(None))) @ b.directions()[left].T
            moved += int(((u / T).softmax(-1).argmax(1) != s.place[:, left].long()).sum())
        assert moved > 20                                     # the maximum did move, and was followed


def test_one_position_and_large_grids():
    for side in (1, 17):
        t = labelled(K, 2, side, D)
        editor = E.Editor(model(), t).switch_off([0, 5], "softmax")
        want = slow_presence(t, editor.edited().book, .1)
        torch.testing.assert_close(editor.presence[:, editor.edited().edits["codes"]].double(), want, atol=2e-5, rtol=2e-5)


def test_merging_equal_codes_changes_nothing():
    m, t = model(), images()
    codes = m.book.codes.detach().clone(); codes[5] = codes[2]
    m = ProtoQuant(Net(), Codebook(codes), m.classifier, .1)
    editor = E.Editor(m, t)
    before = editor.logits
    assert editor.duplicates(.999) == [[2, 5]]
    torch.testing.assert_close(editor.merge([2, 5]).logits, before, atol=1e-5, rtol=1e-5)
    assert editor.duplicates(.999) == []                       # one of them is off now
    editor.undo().merge([5, 2], "softmax")
    p = presence(t.read(slice(None)), m.book, .1)[:, 2]
    b = presence(t.read(slice(None)), editor.edited().book, .1)[:, 4]
    torch.testing.assert_close(b, p / (1 - p), atol=1e-5, rtol=1e-4)       # its twin's share goes to it
    assert torch.equal(editor.weight[:, 5], (m.weight[:, 2] + m.weight[:, 5]).detach() / 2)


@pytest.mark.parametrize("edit, says", [
    (dict(op="off", codes=[M], variant="weight"), f"0 to {M - 1}"), (dict(op="off", codes=[-1], variant="weight"), "no code -1"),
    (dict(op="off", codes=[], variant="weight"), "one or more"), (dict(op="off", codes=[1, 1], variant="weight"), "different"),
    (dict(op="off", codes=[1], variant="both"), "'softmax'"), (dict(op="off", codes=[1]), "variant"), (dict(op="merge", codes=[1], variant="weight"), "two or more"),
    (dict(op="shift", codes=[1]), "one of off"), ("off", "one of off"), ({"op": "weight", "code": 1, "class": 9, "value": 1}, "no class 9"),
    ({"op": "weight", "code": 1, "class": "clas 1", "value": 1}, "Did you mean"), ({"op": "weight", "code": 1, "class": 0, "value": -1.}, "not negative"),
    ({"op": "weight", "code": 1, "class": 0, "value": float("nan")}, "not negative"), (dict(op="on", codes=[1]), "on already"),
    (dict(op="off", codes=list(range(M)), variant="softmax"), "no code would be left"), (dict(op="off", codes=[True], variant="weight"), "no code True")])
def test_impossible_edits_are_refused_and_change_nothing(edit, says):
    editor = E.Editor(model(), images())
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")): editor.apply(edit)
    same(editor, E.Editor(model(), images()))
    assert editor.done == [] == editor.undone
    for f, what in ((editor.undo, "nothing to undo"), (editor.redo, "nothing to redo")):
        with pytest.raises(ConfigError, match=what): f()


def test_codes_that_are_off_are_neither_weighed_nor_merged():
    editor = E.Editor(model(), images()).switch_off([1, 2])
    for f in (lambda: editor.reweight(1, 0, 1.), lambda: editor.merge([1, 3])):
        with pytest.raises(ConfigError, match="switch"): f()
    assert editor.switch_off([1, 3]).off == {1: "weight", 2: "weight", 3: "weight"}        # what was off already is no obstacle
    assert editor.switch_off(1, "softmax").removed == [1]


def test_a_new_edit_ends_what_could_be_redone():
    editor = E.Draft(model()).switch_off(1).undo().switch_off(2)
    with pytest.raises(ConfigError, match="redo"): editor.redo()


def test_saved_model_has_its_history_inside_and_says_what_the_editor_said(net, tmp_path):
    h = NonNegLinear(K, M, gen(1), .2, 1.)
    m = ProtoQuant(net, Codebook(randn(M, net.d, seed=3)), h, .2)
    t = Tokens(randn(8, net.grid[0] * net.grid[1], net.d, seed=4).half(), torch.arange(8) % K, net.grid)
    editor = E.Editor(m, t).switch_off([2], "softmax").switch_off([5]).reweight(7, 1, 2.5).merge([8, 9])
    for physical in (False, True):
        editor.save(tmp_path/"m.safetensors", physical)
        back = ProtoQuant.load(tmp_path/"m.safetensors", net)
        torch.testing.assert_close(back.from_features(t.read(slice(None))), editor.logits, atol=2e-5, rtol=2e-5)
        assert back.edits["edits"] == editor.done and back.edits["base"] == m.hash and len(back.edits["codes"]) == len(back.book)
        assert torch.equal(back.book.codes, m.book.codes[back.edits["codes"]])
    twice = E.Draft(back).switch_off(0).edited()
    assert twice.edits["before"] == back.edits and twice.edits["base"] == back.hash
    assert back.classifier.mask[:, [back.edits["codes"].index(c) for c in (7, 8)]].any()
    plain = editor.edited()
    assert not plain.classifier.mask[:, [plain.edits["codes"].index(c) for c in (5, 9)]].any()       # what is off is not trained on again
    assert m.edits is None and torch.equal(m.weight, h.weight)


def test_exported_edits_are_replayed_on_their_model_only(tmp_path):
    m, t = model(), images()
    editor = E.Editor(m, t).switch_off([2, 3], "softmax").merge([8, 9]).reweight(7, "class 1", 2.5).switch_on(3)
    editor.export(tmp_path/"edits.json")
    same(E.replay(m, tmp_path/"edits.json", E.Editor(m, t)), editor)
    assert torch.equal(E.replay(m, json.loads((tmp_path/"edits.json").read_text())).weight, editor.weight)
    other = model(seed=1)
    with pytest.raises(ConfigError) as e: E.replay(other, tmp_path/"edits.json")
    assert m.hash in str(e.value) and other.hash in str(e.value)
    (tmp_path/"bad.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="bad.json is no list of edits"): E.replay(m, tmp_path/"bad.json")
    (tmp_path/"bad.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"): E.replay(m, tmp_path/"bad.json")
    with pytest.raises(DataError, match="no list of edits at"): E.replay(m, tmp_path/"none.json")
    with pytest.raises(ConfigError, match="0 to 11"): E.replay(m, dict(editor.as_list(), edits=[dict(op="on", codes=[99])]))


def test_flips_and_classes_count_what_changed():
    m, t = model(), images(n=10)
    editor = E.Editor(m, t)
    before = editor.predictions.clone()
    editor.switch_off(editor.codes_of(0, 0))
    f = editor.flips()
    assert f.row.tolist() == sorted(f.row, key=lambda i: ("became wrong", "became right", "stays wrong").index(f.effect[f.row == i].item()))
    assert set(f.row) == set((before != editor.predictions).nonzero()[:, 0].tolist()) and len(f) > 0
    for row, label, a, b, effect in zip(f.row, f.label, f.before, f.after, f.effect):
        assert label == f"class {t.labels[row]}" and a == f"class {before[row]}" and b == f"class {editor.predictions[row]}"
        assert effect == ("became wrong" if a == label else "became right" if b == label else "stays wrong")
    c = editor.per_class()
    assert c.called.tolist() == torch.bincount(editor.predictions, minlength=K).tolist() and c.images.sum() == len(t)
    assert (c.right.sum() - c.right_before.sum()) / len(t) == pytest.approx((editor.accuracy - editor.start_accuracy) / 100)
    assert len(editor.flips("last")) == len(f)
    editor.switch_off([c for c in range(M) if c not in editor.off][0])
    assert editor.per_class("last").called_before.tolist() == c.called.tolist()
    with pytest.raises(ConfigError, match="since"): editor.flips("yesterday")


def test_groups_of_duplicates_are_those_of_the_metric():
    from protoquant.metrics import duplicate_codes, duplicate_groups
    codes = randn(40, D, seed=3)[torch.randint(25, (40,), generator=gen(4))] + .02 * randn(40, D, seed=5)
    m = ProtoQuant(Net(), Codebook(codes), NonNegLinear(K, 40, gen(0), .2, 1.), .1)
    for threshold in (.99, .5, -1., 1.):
        assert E.Draft(m).duplicates(threshold) == duplicate_groups(duplicate_codes(m.book, threshold))
    off = E.Draft(m).duplicates(.9)[0][0]
    assert not any(off in g for g in E.Draft(m).switch_off(off).duplicates(.9)) and E.Draft(m).switch_off(list(range(40))).duplicates(.9) == []


def test_a_class_without_codes_is_allowed_and_told():
    editor = E.Editor(model(), images())
    assert editor.notes == []
    editor.switch_off(editor.codes_of(2, 0))
    assert "class 2" in editor.notes[0] and editor.logits[:, 2].abs().max() == 0 and editor.codes_of(2) == []
    editor.switch_off([c for c in range(M) if c not in editor.off])
    assert "No class has a code left" in editor.notes[0] and not editor.logits.any() and (editor.predictions == 0).all()


def test_impact_is_what_switching_off_does():
    editor = E.Editor(model(), images(n=8)).switch_off(3, "softmax")
    table = editor.impact().set_index("code")
    assert 3 not in table.index and len(table) == M - 1
    one = editor.impact([0, 1], class_id=1).set_index("code")
    for code in table.index:
        was = editor.accuracy
        editor.switch_off(code)
        assert table.accuracy[code] == pytest.approx(editor.accuracy) and table.change[code] == pytest.approx(editor.accuracy - was)
        hit = editor.predictions == editor.labels
        if code in one.index: assert one.accuracy[code] == pytest.approx(100 * float(hit[editor.labels == 1].double().mean()))
        editor.undo()
    with pytest.raises(ConfigError, match="no code 12"): editor.impact(12)
    with pytest.raises(ConfigError, match="no image"): editor.explain_row(999)


def test_explanations_keep_the_numbers_of_the_codes():
    m, t = model(T=.3), images()
    m.transform = SimpleNamespace(size=(64, 64))
    editor = E.Editor(m, t).switch_off([0, 1], "softmax").switch_off(4)
    ex = editor.explain_row(3, n=M, min_contribution=0.)
    assert not {0, 1, 4} & set(ex.codes[ex.contribution > 0].tolist()) and ex.predicted == editor.predictions[3]
    assert np.allclose(ex.presence, editor.presence[3, ex.codes], atol=1e-5) and np.allclose(ex.weight, editor.weight[ex.class_id, ex.codes])
    assert ex.logit == pytest.approx(float(editor.logits[3, ex.class_id]), abs=1e-4)


def test_tokens_that_do_not_fit_are_refused():
    m = model()
    with pytest.raises(DataError, match="no images"): E.Editor(m, images().subset(np.zeros(0, int)))
    t = images()
    with pytest.raises(DataError, match="classes up to 7"): E.Editor(m, Tokens(t.array, t.labels + 4, t.grid))
    with pytest.raises(DataError, match="other images"): E.Editor(m, t, Images(1))
    class Store(Tokens):
        def check(self, backbone): raise StoreError("of another backbone")
    with pytest.raises(StoreError): E.Editor(m, Store(t.array, t.labels, t.grid))
