from __future__ import annotations

import io
import itertools
import math
import os
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as safetensors
from scipy import sparse

from shared_core.errors import InputError
from spectral_mf.formats import (
    factors_to_ising,
    ising_to_qubo,
    qubo_to_ising,
    rbm_to_ising,
    read_mar,
    read_model,
    read_pr,
    read_spins,
    write_mar,
    write_model,
    write_pr,
)

WRITERS = [".npz", ".csv", ".uai", ".safetensors"]


def states(n, values=(-1.0, 1.0)):
    return np.array(list(itertools.product(values, repeat=n)))


def energies(A, b, const=0.0):
    A = A.toarray() if sparse.issparse(A) else np.asarray(A)
    x = states(len(b))
    return 0.5 * ((x @ A) * x).sum(1) + x @ b + const


def log_z(model):
    return np.logaddexp.reduce(energies(model.A, model.b, model.const))


def random_model(n, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, n)) * scale
    A = np.triu(A, 1)
    return A + A.T, rng.normal(size=n) * scale


@pytest.fixture
def save(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def mat(**arrays) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, arrays)
    return buffer.getvalue()


# Conversions


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_an_rbm_becomes_an_ising_model_with_the_same_energies(visible, hidden, seed):
    rng = np.random.default_rng(seed)
    W, bv, bh = rng.normal(size=(visible, hidden)), rng.normal(size=visible), rng.normal(size=hidden)
    units = states(visible + hidden, (0.0, 1.0))
    v, h = units[:, :visible], units[:, visible:]
    expected = ((v @ W) * h).sum(1) + v @ bv + h @ bh
    np.testing.assert_allclose(energies(*rbm_to_ising(W, bv, bh)), expected, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.sampled_from(["symmetric", "upper", "lower"]), st.booleans(), st.integers(0, 10**6))
def test_a_qubo_becomes_an_ising_model_with_the_same_energies_and_back(n, form, linear, seed):
    rng = np.random.default_rng(seed)
    Q = rng.normal(size=(n, n))
    Q = {"symmetric": Q + Q.T, "upper": np.triu(Q), "lower": np.tril(Q)}[form]
    c = rng.normal(size=n) if linear else None
    x = states(n, (0.0, 1.0))
    expected = ((x @ Q) * x).sum(1) + (x @ c if linear else 0.0)
    A, b, const = qubo_to_ising(Q, c)
    assert not np.diag(A).any()
    np.testing.assert_array_equal(A, A.T)
    np.testing.assert_allclose(energies(A, b, const), expected, atol=1e-12)
    Q2, c2, const2 = ising_to_qubo(A, b, const)
    np.testing.assert_allclose(((x @ Q2) * x).sum(1) + x @ c2 + const2, expected, atol=1e-12)
    assert const2 == pytest.approx(0, abs=1e-12)


def test_half_the_trace_of_the_couplings_is_in_the_qubos_constant():
    A, b = random_model(4)
    np.fill_diagonal(A, [1.0, -2.0, 0.5, 3.0])
    Q, c, const = ising_to_qubo(A, b)
    x = states(4, (0.0, 1.0))
    np.testing.assert_allclose(((x @ Q) * x).sum(1) + x @ c + const, energies(A, b), atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rbm_to_ising(np.ones((2, 3)), np.ones(3), np.ones(2)), r"W is \(2, 3\) .* W is transposed: pass W.T"),
        (lambda: rbm_to_ising(np.ones((2, 3)), np.ones(2), np.ones(2)), r"2 visible and 2 hidden biases"),
        (lambda: rbm_to_ising(np.ones(3), np.ones(2), np.ones(2)), r"W must be \(visible, hidden\)"),
        (lambda: rbm_to_ising([[math.nan]], [1.0], [1.0]), r"W\[0,0\] is nan"),
        (lambda: qubo_to_ising([[0.0, 1.0], [2.0, 0.0]]), r"Q\[0,1\]=1 but Q\[1,0\]=2"),
        (lambda: qubo_to_ising(np.ones((2, 3))), r"Q must be \(n, n\)"),
        (lambda: qubo_to_ising(np.ones((2, 2)), [1.0]), "c must have length n = 2"),
        (lambda: ising_to_qubo([["a"]]), "A must hold real numbers"),
        (lambda: factors_to_ising([2], [[0]], []), "1 scopes but 0 tables"),
        (lambda: factors_to_ising([], [], []), "no variables"),
        (lambda: factors_to_ising([2], [[0]], [[1.0]]), "factor 0 has 1 table entries, its variables make 2"),
        (lambda: factors_to_ising([2], [[1]], [[1.0, 1.0]]), "factor 0 names variable 1; .* 0 to 0"),
        (lambda: factors_to_ising([2, 2], [[0], [1, 1]], [[1, 1], [1] * 4]), "factor 1 names variable 1 twice"),
        (lambda: factors_to_ising([2], [[0]], [[1.0, 0.0]], floor=0.0), "floor is 0"),
        (lambda: factors_to_ising([2], [[0]], [[1.0, 2.0]], evidence={0: 1}), "evidence fixes all 1 variables"),
        (lambda: factors_to_ising([2, 2], [], [], evidence={2: 1}), "evidence names variable 2"),
        (lambda: factors_to_ising([2, 2], [], [], evidence={1: 2}), "variable 1 in state 2"),
    ],
)
def test_conversions_say_what_is_wrong(call, message, unchecked):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# UAI. The oracle: products of the tables as they stand, over all states of all variables.


def table_log_weights(cardinalities, scopes, tables):
    found = {}
    for state in itertools.product(*(range(c) for c in cardinalities)):
        weight = 1.0
        for scope, table in zip(scopes, tables, strict=True):
            place = 0
            for variable in scope:
                place = place * cardinalities[variable] + state[variable]
            weight *= table[place]
        found[state] = weight
    return found


def uai_text(cardinalities, scopes, tables, kind="MARKOV"):
    lines = [kind, str(len(cardinalities)), " ".join(map(str, cardinalities)), str(len(scopes))]
    lines += [" ".join(map(str, [len(scope), *scope])) for scope in scopes]
    lines += [f"{len(table)}\n" + " ".join(map(repr, table)) for table in tables]
    return "\n".join(lines) + "\n"


BY_HAND = (
    [2, 2, 2],
    [[0, 1], [2, 1], [0], [2], []],
    [[1.0, 2.0, 3.0, 4.0], [0.5, 0.25, 2, 8], [0.1, 0.9], [3, 1], [7.0]],
)


def test_a_model_written_by_hand_has_the_weights_of_its_tables(save):
    model = read_model(save("m.uai", uai_text(*BY_HAND)))
    weights = table_log_weights(*BY_HAND)
    np.testing.assert_allclose(energies(model.A, model.b, model.const), np.log(list(weights.values())), atol=1e-12)
    # 0,0,0 has 1 * .5 * .1 * 3 * 7, read off the tables above.
    assert energies(model.A, model.b, model.const)[0] == pytest.approx(math.log(1.05))
    assert log_z(model) == pytest.approx(math.log(sum(weights.values())), abs=1e-12)
    assert model.variables is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_network_with_any_evidence_keeps_the_weights_of_its_tables(data):
    n = data.draw(st.integers(2, 5))
    observed = data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1))
    cards = [data.draw(st.integers(1, 4)) if k in observed else 2 for k in range(n)]
    evidence = {k: data.draw(st.integers(0, cards[k] - 1)) for k in observed}
    free = [k for k in range(n) if k not in observed]
    scopes = []
    for _ in range(data.draw(st.integers(0, 6))):
        unobserved = data.draw(st.permutations(free))[: data.draw(st.integers(0, 2))]
        fixed = [k for k in observed if data.draw(st.booleans())]
        scopes.append(data.draw(st.permutations([*unobserved, *fixed])))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    tables = [rng.uniform(0.1, 3, math.prod(cards[k] for k in scope)).tolist() for scope in scopes]
    weights = table_log_weights(cards, scopes, tables)
    expected = [w for s, w in weights.items() if all(s[k] == v for k, v in evidence.items())]
    model = factors_to_ising(cards, scopes, tables, evidence=evidence)
    np.testing.assert_allclose(energies(model.A, model.b, model.const), np.log(expected), atol=1e-10)
    assert (free if evidence else None) == (None if model.variables is None else model.variables.tolist())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.uai"
        path.write_text(uai_text(cards, scopes, tables))
        again = read_model(path, evidence=evidence)
        pairs = " ".join(f"{k} {v}" for k, v in evidence.items())
        for samples in ("", "1\n"):
            (Path(folder) / "m.uai.evid").write_text(f"{samples}{len(evidence)} {pairs}\n")
            by_file = read_model(path, evidence="auto")
            np.testing.assert_array_equal(by_file.A, model.A)
            assert by_file.evidence == evidence
    np.testing.assert_array_equal(again.b, model.b)
    assert again.const == model.const


def test_a_bayes_network_sums_to_one_and_its_evidence_to_its_probability(save):
    # Rain -> wet, sprinkler -> slip; the last table belongs to (rain, wet) in this order.
    text = "BAYES\n3\n2 2 2\n3\n1 0\n2 0 1\n2 1 2\n\n2 .8 .2\n4 .9 .1 .3 .7\n4 .95 .05 .4 .6\n"
    path = save("rain.uai", text)
    assert log_z(read_model(path)) == pytest.approx(0, abs=1e-12)
    slip = 0.8 * (0.9 * 0.05 + 0.1 * 0.6) + 0.2 * (0.3 * 0.05 + 0.7 * 0.6)
    evidence = save("slip.evid", "1 2 1\n")
    model = read_model(path, evidence=evidence)
    assert log_z(model) == pytest.approx(math.log(slip), abs=1e-12)
    assert model.variables.tolist() == [0, 1]
    assert model.n == 2


def test_evidence_is_used_only_when_asked_for(save):
    path = save("m.uai", uai_text(*BY_HAND))
    assert read_model(path, evidence="auto").n == 3
    save("m.uai.evid", "1 0 1")
    assert read_model(path).n == 3
    assert read_model(path, evidence="auto").n == 2


def test_zeros_that_evidence_rules_out_do_no_harm(save):
    path = save("m.uai", uai_text([2, 2], [[0, 1]], [[1.0, 2.0, 0.0, 0.0]]))
    model = read_model(path, evidence={0: 0})
    assert log_z(model) == pytest.approx(math.log(3))
    with pytest.raises(InputError, match=r"m\.uai: factor 0, entry 2 is zero.*--floor 1e-12"):
        read_model(path, evidence={0: 1})


def test_a_floor_replaces_zeros(save):
    path = save("m.uai", uai_text([2], [[0]], [[0.0, 3.0]]))
    model = read_model(path, floor=1e-12)
    np.testing.assert_allclose(energies(model.A, model.b, model.const), np.log([1e-12, 3.0]), atol=1e-12)


@pytest.mark.parametrize("change", [lambda t: t.replace("\n", "\r\n"), lambda t: "\ufeff" + t, str.lower, str.split])
def test_line_ends_marks_and_spacing_do_not_matter(save, change):
    text = change(uai_text(*BY_HAND))
    model = read_model(save("m.uai", text if isinstance(text, str) else "  ".join(text)))
    expected = read_model(save("n.uai", uai_text(*BY_HAND)))
    np.testing.assert_array_equal(model.A, expected.A)


def test_a_file_cut_off_after_any_token_is_refused(save):
    tokens = uai_text(*BY_HAND).split()
    for count in range(len(tokens)):
        path = save("cut.uai", " ".join(tokens[:count]))
        with pytest.raises(InputError, match=r"cut\.uai") as caught:
            read_model(path)
        assert "\n" not in str(caught.value)
        if count > 1:
            assert f"the file has {count} tokens" in str(caught.value)


def small(text):
    return f"MARKOV\n2\n2 2\n1\n2 0 1\n{text}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("GRAPH 2", "token 1 is 'GRAPH'; the file must begin with MARKOV or BAYES"),
        ("MARKOV 0 0", "there are no variables"),
        ("MARKOV two", "token 2 is 'two'; expected a number"),
        ("MARKOV 2 2 1_0 0", "token 4 is '1_0'; expected a number"),
        ("MARKOV -3", "token 2: number of variables is -3; expected a whole number"),
        ("MARKOV 2.5", "token 2: number of variables is 2.5"),
        ("MARKOV nan", "token 2: number of variables is nan"),
        ("MARKOV 999999999", "999999999 more tokens expected from token 3 on, the file has 2 tokens"),
        ("MARKOV 1e15 2 2", "1000000000000000 more tokens expected"),
        ("MARKOV 1e300 2 2", "number of variables is 1e[+]300"),
        ("MARKOV 2 2 2 999999999", "999999999 more tokens expected from token 6"),
        ("MARKOV 2 2 2 1 999999999 0 1", "scope of factor 0: 999999999 more tokens expected"),
        ("MARKOV 2 2 2 1 1.5 0 1 2 1 1", "number of variables of a factor is 1.5"),
        ("MARKOV 2 2 0 0", "variable 1 has 0 states"),
        ("MARKOV 2 2 3 1 2 0 1 6 1 1 1 1 1 1", r"variable 1 has 3 states \(factor 0 has it\)"),
        ("MARKOV 2 1000000000 1000000000 1 2 0 1 4 1 1 1 1", "declares 4 table entries, its 2 variables make 1000"),
        ("MARKOV 2 2 1000000000 1 1 1 1000000000 1 1", "1000000001 more tokens expected from token 8"),
        ("MARKOV 3 2 2 2 1 3 0 1 2 8 1 1 1 1 1 1 1 1", r"factor 0 joins 3 unobserved variables \(0, 1, 2\)"),
        ("MARKOV 2 2 2 1 2 0 5 4 1 1 1 1", "factor 0 names variable 5; there are variables 0 to 1"),
        ("MARKOV 2 2 2 1 2 0 -1 4 1 1 1 1", "is -1; expected a whole number"),
        ("MARKOV 2 2 2 1 2 1 1 4 1 1 1 1", "factor 0 names variable 1 twice"),
        (small("3 1 1 1"), "token 9: factor 0 declares 3 table entries, its 2 variables make 4"),
        (small("4 1 1 1"), "table of factor 0: 5 more tokens expected from token 9 on, the file has 12 tokens"),
        (small("4 1 1 1 1 9 9"), "2 tokens too many, from token 14 on"),
        (small("4 1 -0.5 1 1"), "factor 0, entry 1 is -0.5; table entries are finite and not negative"),
        (small("4 1 1 nan 1"), "factor 0, entry 2 is nan"),
        (small("4 1 1 1 1e999"), "factor 0, entry 3 is inf"),
        (small("4 1 1 0 1"), "factor 0, entry 2 is zero"),
        (small("4 1 1 one 1"), "token 12 is 'one'; expected a number"),
    ],
)
def test_a_bad_uai_file_is_refused_with_its_place(save, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read_model(save("bad.uai", text))
    assert "bad.uai" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 7 0", "evidence names variable 7"),
        ("1 0 2", "puts variable 0 in state 2"),
        ("2 0 1", "2 observed variables take 5 tokens, the file has 3"),
        ("2\n1 0 1\n1 0 0", "several samples"),
        ("2 0 1 0 0", "token 4: variable 0 is observed twice"),
        ("1 0 x", "token 3 is 'x'"),
        ("", "is empty"),
    ],
)
def test_bad_evidence_is_refused_in_the_name_of_its_file(save, text, message):
    path = save("m.uai", uai_text(*BY_HAND))
    with pytest.raises(InputError, match=message) as caught:
        read_model(path, evidence=save("bad.evid", text))
    assert "bad.evid" in str(caught.value)


def test_large_uai_files_stay_sparse(save):
    n = 20_000
    cards, scopes = [2] * n, [[k, k + 1] for k in range(n - 1)]
    model = read_model(save("chain.uai", uai_text(cards, scopes, [[2.0, 1.0, 1.0, 2.0]] * (n - 1))))
    assert isinstance(model.A, sparse.csr_array)
    assert model.A.nnz == 2 * (n - 1)
    np.testing.assert_allclose(model.A.data, math.log(2) / 2)


def test_factors_on_one_pair_add_up():
    model = factors_to_ising([2, 2], [[0, 1], [1, 0]], [[2.0, 1.0, 1.0, 2.0], [8.0, 1.0, 1.0, 8.0]])
    assert model.A[0, 1] == model.A[1, 0] == pytest.approx(math.log(16) / 2)


# Round trips


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(WRITERS),
    st.integers(1, 5),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.floats(-500, 500),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_what_is_written_is_read_back(ending, n, scale, const, diagonal, as_sparse, seed):
    A, b = random_model(n, seed, scale)
    if diagonal:
        np.fill_diagonal(A, np.arange(n) - 1.5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"m{ending}"
        write_model(path, sparse.csr_array(A) if as_sparse else A, b, const)
        assert [file.name for file in Path(folder).iterdir()] == [path.name]
        model = read_model(path)
    expected = energies(A, b, const)
    np.testing.assert_allclose(energies(model.A, model.b, model.const), expected, atol=1e-11 * (1 + abs(const) + scale))


@pytest.mark.parametrize("ending", WRITERS)
def test_sparse_models_round_trip_in_every_format(tmp_path, ending):
    n = 70
    i = np.arange(n - 1)
    weight = np.random.default_rng(0).normal(size=n - 1)
    A = sparse.coo_array((np.tile(weight, 2), (np.r_[i, i + 1], np.r_[i + 1, i])), shape=(n, n)).tocsr()
    path = tmp_path / f"m{ending}"
    write_model(path, A, None, const=2.5)
    model = read_model(path)
    np.testing.assert_allclose(model.A.toarray() if sparse.issparse(model.A) else model.A, A.toarray(), atol=1e-13)
    assert sparse.issparse(model.A) == (ending != ".safetensors")
    assert model.const == pytest.approx(2.5)
    np.testing.assert_allclose(model.b, 0, atol=1e-14)
    if ending == ".npz":
        assert abs(sparse.load_npz(path) - A).max() == 0


def test_a_matrix_saved_by_scipy_is_a_model_without_fields(tmp_path):
    A, _ = random_model(4)
    for form in ("csr", "csc"):
        sparse.save_npz(tmp_path / "m.npz", sparse.csr_array(A).asformat(form))
        model = read_model(tmp_path / "m.npz")
        np.testing.assert_array_equal(model.A, A)
        assert not model.b.any()


def test_a_node_without_edge_or_field_survives_csv(tmp_path):
    write_model(tmp_path / "m.csv", np.zeros((3, 3)), None)
    assert read_model(tmp_path / "m.csv").n == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: write_model(p / "m.uai", [[0.0, 800.0], [800.0, 0.0]], None), r"exp\(800\) is no float; write .npz"),
        (lambda p: write_model(p / "m.txt", [[0.0]], None), "cannot write '.txt'; choose .npz"),
        (lambda p: write_model(p / "m.npz", [[0.0, 1.0], [2.0, 0.0]], None), r"A\[0,1\]=1 but A\[1,0\]=2"),
        (lambda p: write_model(p / "m.npz", [[0.0]], [1.0, 2.0]), "b must have length n = 1"),
        (lambda p: write_model(p / "m.npz", np.zeros((0, 0)), []), "A is empty"),
        (lambda p: write_model(p / "m.npz", np.zeros((2, 3)), None), r"A must be \(n, n\), one model"),
        (lambda p: write_model(p / "m.npz", [[0.0]], None, math.inf), "const is inf"),
        (lambda p: write_model(p / "file" / "m.npz", [[0.0]], None), "cannot write"),
        (lambda p: write_model(p / "folder.npz", [[0.0]], None), "cannot write"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, call, message, unchecked):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(InputError, match=message):
        call(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.npz"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.uai"
    write_model(path, [[0.0, 1.0], [1.0, 0.0]], None)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left"):
        write_model(path, [[0.0, 2.0], [2.0, 0.0]], None)
    assert path.read_bytes() == before


# CSV


def test_edges_fields_and_constant_are_read(save):
    text = "i,j,weight\r\n0,1,0.5\r\n\r\n2,1,-1\r\n1,1,0.25\r\nconst,,3\r\n"
    model = read_model(save("m.csv", text))
    np.testing.assert_array_equal(model.A, [[0, 0.5, 0], [0.5, 0, -1], [0, -1, 0]])
    assert model.b.tolist() == [0, 0.25, 0]
    assert model.const == 3


@pytest.mark.parametrize("text", ["0,1,0.5\n", "0;1;0.5\n", "0\t1\t.5\n", "0 1  5e-1\n", "\ufeffi,j,weight\n0,1,0.5\n"])
def test_headers_and_delimiters_are_found_out(save, text):
    assert read_model(save("m.csv", text)).A[1, 0] == 0.5


def test_fields_may_lie_in_a_second_file(save):
    fields = save("fields.csv", "i,field\n2,1.5\n0,-1\n")
    model = read_model(save("m.csv", "0,1,1\n"), fields=fields)
    assert model.b.tolist() == [-1, 0, 1.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1\n", r"bad\.csv:1: expected 3 fields \(i,j,weight\), got 2"),
        ("i,j,weight\n0,1,1\n0,2\n", r"bad\.csv:3: expected 3 fields"),
        ("i,j,weight\n", "no edge and no field"),
        ("0,1,x\n", r"bad\.csv:1: weight is 'x'; it must be a finite number"),
        ("0,1,nan\n", r"bad\.csv:1: weight is 'nan'"),
        ("0,1,inf\n", r"bad\.csv:1: weight is 'inf'"),
        ("0,1,1\n-1,0,1\n", r"bad\.csv:2: i is '-1'; nodes are whole numbers from 0"),
        ("0,1.5,1\n", r"bad\.csv:1: j is '1.5'"),
        (f"0,{'9' * 5000},1\n", r"bad\.csv:1: j is '9999"),
        ("0,999999999,1\n", "node 1 does not occur but node 999999999 does"),
        ("1,2,1\n", "node 0 does not occur but node 2 does; .* such as 0,0,0"),
        ("0,1,1\n1,2,1\n0,1,2\n", r"bad\.csv:3: edge 0,1 is in line 1 already"),
        ("0,1,1\n1,2,1\n1,0,2\n", r"bad\.csv:3: edge 1,0 is in line 1 already"),
        ("0,0,1\n0,0,1\n", r"bad\.csv:2: the field of node 0 is given a second time"),
        ("const,,1\nconst,,2\n0,0,1", r"bad\.csv:2: the constant is given a second time"),
        ("const,1,1\n", "i is 'const'"),
        (b"0,1,\xff\n", "byte 5 is not UTF-8 text"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\x00\x01,\x02,\x03\n", "bad.csv"),
        (f'0,1,"{"1" * 200_000}"\n', r"bad\.csv:\d: not a CSV line"),
    ],
)
def test_a_bad_edge_list_is_refused_with_its_line(save, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read_model(save("bad.csv", text))
    assert "\n" not in str(caught.value)


def test_a_field_given_in_both_files_is_refused(save):
    with pytest.raises(InputError, match=r"f\.csv:1: the field of node 0 is given a second time"):
        read_model(save("m.csv", "0,1,1\n0,0,1\n"), fields=save("f.csv", "0,2\n"))


# NPZ, safetensors, MAT


RBM = {"W": np.arange(6.0).reshape(3, 2), "bv": np.array([1.0, -1, 0]), "bh": np.array([0.5, 2])}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_an_rbm_file_keeps_its_parts(save, kind):
    content = npz(**RBM) if kind == "npz" else safetensors.save({k: v.astype(np.float32) for k, v in RBM.items()})
    model = read_model(save(f"rbm.{kind}", content))
    A, b, const = rbm_to_ising(**RBM)
    np.testing.assert_array_equal(model.A, A)
    np.testing.assert_array_equal(model.b, b)
    assert model.const == const
    np.testing.assert_array_equal(model.rbm[0], RBM["W"])


def test_an_npz_may_hold_a_true_value_and_fortran_order(save):
    A, b = random_model(3)
    model = read_model(save("m.npz", npz(A=np.asfortranarray(A), b=b[:, None], const=2, log_partition=4.5)))
    np.testing.assert_array_equal(model.A, A)
    np.testing.assert_array_equal(model.b, b)
    assert (model.const, model.log_partition) == (2.0, 4.5)
    assert not read_model(save("n.npz", npz(A=A))).b.any()


def hostile_npy(shape, dtype="<f8", body=b"\0" * 64):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + body


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


EYE = np.eye(2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a zip", "is not a readable NPZ file"),
        (npz(A=EYE, b=np.zeros(2))[:-30], "is not a readable NPZ file"),
        (npz(A=EYE, b=np.array([{}, {}])), "'b' holds Python objects, which are never unpickled"),
        (npz(A=EYE, h=np.zeros(2)), r"needs arrays A and b, or W, bv and bh .* found A \(2, 2\), h \(2,\)"),
        (npz(b=np.zeros(2)), "needs arrays A and b"),
        (npz(A=EYE, **RBM), "holds both A and an RBM"),
        (npz(**(RBM | {"W": RBM["W"].T})), "W is transposed"),
        (npz(A=np.ones((2, 3)), b=np.zeros(2)), r"A must be \(n, n\)"),
        (npz(A=np.ones((4, 2, 2)), b=np.zeros(2)), "one model"),
        (npz(A=EYE, b=np.zeros(3)), "b must have length n = 2, as A says"),
        (npz(A=EYE + 0j, b=np.zeros(2)), "A must hold real numbers, it holds complex128"),
        (npz(A=np.array([["a"]]), b=np.zeros(1)), "A must hold real numbers"),
        (npz(A=np.array([[0, np.nan], [np.nan, 0]]), b=np.zeros(2)), r"A\[0,1\] is nan; every entry must be finite"),
        (npz(A=EYE, b=np.array([0, np.inf])), r"b\[1\] is inf"),
        (npz(A=EYE, b=np.zeros(2), const=np.zeros(2)), "const must be one number"),
        (npz(A=np.array([[0, 1.0], [0.5, 0]]), b=np.zeros(2)), r"A\[0,1\]=1 but A\[1,0\]=0.5"),
        (npz(data=[1.0], indices=[5], indptr=[0, 1], shape=[1, 1], format=b"csr"), "not a sound sparse matrix"),
        (npz(data=[1.0], indices=[0], indptr=[0, 1], shape=[9, 9], format=b"csr"), "do not fit its shape"),
        (
            npz(data=np.zeros(0), indices=np.zeros(0, int), indptr=[0, 9**9, 0], shape=[2, 2]),
            "not a sound sparse matrix",
        ),
        (npz(data=[1.0], indices=[0], indptr=[0, 1], shape=[1, -1]), "do not fit its shape"),
        (npz(data=np.zeros(0), indices=np.zeros(0, int), indptr=np.zeros(0, int), shape=[-1, -1]), "do not fit"),
        (npz(data=[1.0], indices=[0], indptr=[0, 2], shape=[1, 1]), "not a sound sparse matrix"),
        (npz(data=[1.0], indices=[0], indptr=[0, 1], shape=[1, 1], format=b"bsr"), "not in CSR form"),
        (npz(data=[1.0], indices=[1], indptr=[0, 1, 1], shape=[2, 2]), r"A\[0,1\]=1 but A\[1,0\]=0"),
        (npz(data=[np.nan], indices=[0], indptr=[0, 1], shape=[1, 1]), r"data\[0\] is nan"),
        (zipped(A=hostile_npy("(999999999, 999999999)")), "declares float64 .* but 64 are there"),
        (zipped(A=hostile_npy("(2, 99)")), "truncated or damaged"),
        (zipped(A=hostile_npy("(-2, -4)")), "truncated or damaged"),
        (zipped(A=hostile_npy("(2, 4)", "|O")), "Python objects"),
        (zipped(A=b"junk"), "array 'A' is damaged"),
        (zipped(), "found nothing"),
    ],
)
def test_a_bad_npz_is_refused(save, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_model(save("bad.npz", content))
    assert "bad.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_zip_bomb_is_not_unpacked(save):
    content = bytearray(zipped(A=hostile_npy("(2, 4)")))
    at = content.rindex(b"PK\x01\x02")
    # ZIP64 sizes do not matter here: 4 GB each in three directory entries are more than is allowed.
    entry = bytes(content[at : content.rindex(b"PK\x05\x06")])
    entry = entry[:24] + struct.pack("<I", 2**32 - 2) + entry[28:]
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 3, 3, 3 * len(entry), at, 0)
    with pytest.raises(InputError, match=r"unpacks to 12\.9 GB"):
        read_model(save("bomb.npz", bytes(content[:at]) + entry * 3 + end))


def mat_family():
    rng = np.random.default_rng(0)
    A = rng.normal(size=(4, 4, 2, 3))
    A = A + A.transpose(1, 0, 2, 3)
    return A, rng.normal(size=(4, 2, 3)), rng.normal(size=(2, 3))


def test_the_authors_data_set_is_read_by_strength_and_instance(save):
    A, h, value = mat_family()
    path = save("m.mat", mat(A=A, h=h, logZ=value, cw_range=np.ones((1, 2)), nSample=3))
    for index in itertools.product(range(2), range(3)):
        model = read_model(path, index=index)
        np.testing.assert_array_equal(model.A, A[:, :, index[0], index[1]])
        np.testing.assert_array_equal(model.b, h[:, index[0], index[1]])
        assert model.log_partition == value[index]


def test_a_single_model_in_a_mat_file(save):
    A, b = random_model(3)
    for name, vector in (("h", b[:, None]), ("b", b[None])):
        model = read_model(save("m.mat", mat(A=A, **{name: vector})))
        np.testing.assert_array_equal(model.A, A)
        np.testing.assert_array_equal(model.b, b)
        assert model.log_partition is None
    model = read_model(save("s.mat", mat(A=sparse.csc_array(A), h=b, logZ=2.0)))
    np.testing.assert_array_equal(model.A, A)
    assert model.log_partition == 2.0


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, r"holds 2 and 3 models; pass index=\(strength, instance\), from 0 and below 2 and 3"),
        ((1,), "pass index="),
        ((2, 0), r"index \(2, 0\) is out of range"),
        ((0, -1), "out of range"),
    ],
)
def test_a_wrong_index_says_what_there_is(save, index, message):
    A, h, _ = mat_family()
    with pytest.raises(InputError, match=message):
        read_model(save("m.mat", mat(A=A, h=h)), index=index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 200, r"MATLAB 7.3 \(HDF5\) file; save it with .*-v7"),
        (b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512, b"\0"), "MATLAB 7.3"),
        (b"junk" * 100, "not a MATLAB file of version 5 to 7.2"),
        (mat(A=EYE, h=np.zeros(2))[:200], "bad.mat"),
        (mat(A=EYE), r"needs arrays A and h \(or b\); found A \(2, 2\)"),
        (mat(A=EYE, h=np.zeros(2), b=np.zeros(2)), "needs arrays A and h"),
        (mat(A=np.zeros((2, 3)), h=np.zeros(2)), r"A must be \(n, n\)"),
        (mat(A=EYE, h=np.zeros(3)), "b must have length n = 2"),
        (mat(A={"x": 1}, h=np.zeros(3)), "bad.mat"),
    ],
)
def test_a_bad_mat_file_is_refused(save, content, message):
    with pytest.raises(InputError, match=message):
        read_model(save("bad.mat", content))


def big_endian(data: bytes) -> bytes:
    """Turn SciPy's little-endian file, as far as these tests write one, around."""

    def turn(content: bytes) -> bytes:
        turned, at = b"", 0
        while at < len(content):
            kind, size = struct.unpack_from("<II", content, at)
            small = kind >> 16
            kind, size, start = (kind & 0xFFFF, small, at + 4) if small else (kind, size, at + 8)
            end = at + 8 if small else start + -(-size // 8) * 8
            width = {5: 4, 6: 4, 9: 8}.get(kind, 1)
            body = turn(content[start : start + size]) if kind == 14 else content[start : start + size]
            body = b"".join(body[k : k + width][::-1] for k in range(0, len(body), width)) if kind != 14 else body
            head = struct.pack(">HH", small, kind) if small else struct.pack(">II", kind, size)
            turned += head + body.ljust(end - start, b"\0")
            at = end
        return turned

    return data[:124] + b"\x01\x00MI" + turn(data[128:])


def test_compressed_big_endian_and_integer_mat_files(save):
    A, b = random_model(3)
    buffer = io.BytesIO()
    scipy.io.savemat(
        buffer, {"A": A, "h": b, "text": "x", "record": {"A": 1}, "z": 1j, "none": []}, do_compression=True
    )
    whole = mat(A=np.eye(3, dtype=np.int16), h=np.zeros(3, dtype=np.float32))
    np.testing.assert_array_equal(read_model(save("c.mat", buffer.getvalue())).A, A)
    np.testing.assert_array_equal(read_model(save("b.mat", big_endian(mat(A=A, h=b)))).A, A)
    np.testing.assert_array_equal(read_model(save("i.mat", whole)).A, np.eye(3))


def test_what_no_model_is_made_of_in_a_mat_file(save):
    for A in (EYE + 1j, "text", {"x": 1.0}, np.array([[1, "a"]], dtype=object)):
        with pytest.raises(InputError, match="A is no array of real numbers"):
            read_model(save("bad.mat", mat(A=A, h=np.zeros(2))))
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"A": EYE, "h": np.zeros(2)}, format="4")
    with pytest.raises(InputError, match="not a MATLAB file of version 5"):
        read_model(save("bad.mat", buffer.getvalue()))


def test_a_compressed_bomb_in_a_mat_file_is_not_unpacked_without_end(save, monkeypatch):
    monkeypatch.setattr("spectral_mf._mat.LARGEST", 10_000)
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"A": np.zeros((100, 100)), "h": np.zeros(100)}, do_compression=True)
    with pytest.raises(InputError, match="truncated or too large"):
        read_model(save("bomb.mat", buffer.getvalue()))


def test_shapes_in_a_mat_file_must_agree(save):
    A, h, value = mat_family()
    with pytest.raises(InputError, match=r"so h must be \(4, 2, 3\), got \(4, 2, 2\)"):
        read_model(save("m.mat", mat(A=A, h=h[..., :2])), index=(0, 0))
    with pytest.raises(InputError, match="they must agree"):
        read_model(save("m.mat", mat(A=A, h=h, logZ=value[:, :2])), index=(0, 0))


@pytest.mark.parametrize(
    "content",
    [
        b"junk",
        struct.pack("<Q", 2**60) + b"{}",
        safetensors.save({"A": EYE, "b": np.zeros(2)})[:-8],
        safetensors.save({"x": EYE}),
        safetensors.save({"A": EYE}).replace(b"F64", b"F99"),
    ],
)
def test_a_bad_safetensors_file_is_refused(save, content):
    with pytest.raises(InputError, match=r"bad\.safetensors"):
        read_model(save("bad.safetensors", content))


# Any file


def test_paths_that_are_no_files(tmp_path, save):
    (tmp_path / "folder.npz").mkdir()
    for call in (read_model, read_spins):
        with pytest.raises(InputError, match="is a directory"):
            call(tmp_path)
        with pytest.raises(InputError, match="cannot tell what"):
            call(tmp_path / ("x" * 5000))
    for call in (read_model, read_spins, read_pr):
        with pytest.raises(InputError, match="is a directory; give a file"):
            call(tmp_path / "folder.npz")
        with pytest.raises(FileNotFoundError) as caught:
            call(tmp_path / "absent.npz")
        assert "absent.npz" in caught.value.filename
    for name in ("m.json", "m"):
        with pytest.raises(InputError, match="cannot tell what"):
            read_model(save(name, "x"))
    with pytest.raises(InputError, match="cannot be read"):
        read_model(tmp_path / f"{'x' * 5000}.npz")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(save):
    path = save("m.csv", "0,1,1\n")
    path.chmod(0)
    with pytest.raises(PermissionError):
        read_model(path)


@pytest.mark.parametrize("ending", [".npz", ".csv", ".uai", ".mat", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"   \n"])
def test_empty_files_are_refused(save, ending, content):
    with pytest.raises(InputError, match="is empty"):
        read_model(save(f"m{ending}", content))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("m.csv", {"floor": 1e-9}),
        ("m.csv", {"evidence": {0: 1}}),
        ("m.uai", {"index": (0, 0)}),
        ("m.npz", {"fields": "f"}),
    ],
)
def test_options_of_another_format_are_refused(save, name, options):
    with pytest.raises(InputError, match=f"{next(iter(options))} is for .* files"):
        read_model(save(name, "0,1,1\n"), **options)


def test_evidence_auto_suits_every_format(save):
    assert read_model(save("m.csv", "0,1,1\n"), evidence="auto").n == 2


def _whole_files():
    A, b = random_model(3)
    with tempfile.TemporaryDirectory() as folder:
        for ending in WRITERS:
            write_model(Path(folder) / f"m{ending}", A, b, 1.0)
        files = {ending: (Path(folder) / f"m{ending}").read_bytes() for ending in WRITERS}
    return files | {
        ".mat": mat(A=A, h=b),
        ".sparse.mat": mat(A=sparse.csc_array(A), h=b),
        ".sparse.npz": npz(**_sparse_parts(A)),
    }


def _sparse_parts(A):
    matrix = sparse.csr_array(A)
    return {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr, "shape": np.array([3, 3])}


WHOLE = _whole_files()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", sorted(WHOLE))
def test_damaged_bytes_give_a_sound_model_or_one_line(tmp_path, ending):
    rng = np.random.default_rng(sum(map(ord, ending)))
    path, refused, sound = tmp_path / f"m{ending}", 0, 0
    for trial in range(150):
        content = bytearray(WHOLE[ending])
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        if trial % 3 == 0:
            del content[rng.integers(len(content)) :]
        path.write_bytes(content)
        try:
            model = read_model(path)
        except InputError as error:
            refused += f"m{ending}" in str(error) and "\n" not in str(error)
        else:
            A = model.A.toarray() if sparse.issparse(model.A) else model.A
            assert np.isfinite(A).all()
            np.testing.assert_allclose(A, A.T, atol=1e-8 * np.abs(A).max())
            assert np.isfinite(model.b).all()
            assert math.isfinite(model.const)
            sound += 1
    assert refused + sound == 150
    assert refused > 50


# Results


def test_partition_functions_round_trip_and_hold_log10(tmp_path, save):
    write_pr(tmp_path / "m.PR", -1234.5)
    assert read_pr(tmp_path / "m.PR") == pytest.approx(-1234.5, rel=1e-15)
    word, value = (tmp_path / "m.PR").read_text().split()
    assert word == "PR"
    assert 10 ** (float(value) / 100) == pytest.approx(math.exp(-12.345))
    assert read_pr(save("s.PR", "PR\n1\n2\n")) == pytest.approx(2 * math.log(10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MAR 1 2", "must begin with PR"),
        ("PR", "log10 Z: 1 more tokens expected"),
        ("PR 2 3", "1 tokens too many"),
        ("PR -inf", "token 2: log10 Z is -inf"),
        ("PR x", "token 2 is 'x'"),
    ],
)
def test_a_bad_pr_file_is_refused(save, text, message):
    with pytest.raises(InputError, match=message):
        read_pr(save("bad.PR", text))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.sets(st.integers(0, 5)), st.integers(0, 10**6))
def test_marginals_round_trip_with_observed_variables_in_place(probabilities, places, seed):
    total = len(probabilities) + len(places)
    evidence = {k: (seed >> k) & 1 for k in places if k < total}
    given_ = probabilities + [0.5] * (len(places) - len(evidence))
    with tempfile.TemporaryDirectory() as folder:
        write_mar(Path(folder) / "m.MAR", given_, evidence=evidence)
        found = read_mar(Path(folder) / "m.MAR")
    assert {k: found[k] for k in evidence} == evidence
    assert [found[k] for k in range(total) if k not in evidence] == given_


def test_marginals_may_lead_with_the_number_of_samples(save):
    for text in ("MAR\n1\n2 2 .75 .25 2 .5 .5", "MAR\n2 2 .75 .25 2 .5 .5"):
        assert read_mar(save("m.MAR", text)).tolist() == [0.25, 0.5]


def test_probabilities_a_rounding_error_outside_are_taken(tmp_path):
    write_mar(tmp_path / "m.MAR", [1 + 1e-12, -1e-12])
    assert read_mar(tmp_path / "m.MAR").tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MAR 2 2 .5 .5", "marginals of 2 binary variables: 6 more tokens"),
        ("MAR 1 3 .5 .5", "token 3: variable 0 has '3 0.5 0.5'"),
        ("MAR 1 2 .5 .6", "add up to 1"),
        ("MAR 1 2 1.5 -.5", "add up to 1"),
        ("MAR 1 2 nan .5", "add up to 1"),
        ("MAR 1 2 .5 .5 7", "too many"),
    ],
)
def test_a_bad_mar_file_is_refused(save, text, message):
    with pytest.raises(InputError, match=message):
        read_mar(save("bad.MAR", text))


@pytest.mark.parametrize(
    ("probabilities", "evidence", "message"),
    [
        ([0.5, 1.1], None, r"probabilities\[1\] is 1.1"),
        ([-0.5], None, r"probabilities\[0\] is -0.5; give P"),
        ([], None, "one for each variable"),
        ([[0.5]], None, r"got shape \(1, 1\)"),
        ([0.5], {2: 0}, "does not fit 2 binary variables"),
        ([0.5], {1: 2}, "states are 0 and 1"),
    ],
)
def test_marginals_that_are_none_are_refused(tmp_path, probabilities, evidence, message):
    with pytest.raises(InputError, match=message):
        write_mar(tmp_path / "m.MAR", probabilities, evidence=evidence)
    with pytest.raises(InputError, match="log_z is nan"):
        write_pr(tmp_path / "m.PR", math.nan)


# Data tables


NAN = math.nan


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.csv", "0,1\n1,0\n", [[-1, 1], [1, -1]]),
        ("x.csv", "-1,1\n1,-1\n", [[-1, 1], [1, -1]]),
        ("x.csv", "a,b\r\n0,1\r\n", [[-1, 1]]),
        ("x.csv", "a,b\n0,\nNA,1\n", [[-1, NAN], [NAN, 1]]),
        ("x.csv", "0.0,1.0,1e0\n", [[-1, 1, 1]]),
        ("x.csv", "0,1,2\n0,1,1\n", [[-1, 1, 1]]),
        ("x.csv", "1,2,3\n0,1,1\n", [[-1, 1, 1]]),
        ("x.csv", '"","q1","q2"\n"1",0,1\n"7",1,NA\n', [[-1, 1], [1, NAN]]),
        ("x.csv", "rownames,q1\nann,0\nbob,1\n", [[-1], [1]]),
        ("x.csv", "q\n0\n1\n", [[-1], [1]]),
        ("x.tsv", "a\tb\n0\t1\n\t\n", [[-1, 1], [NAN, NAN]]),
        ("x.csv", "a;b\n0;1\n", [[-1, 1]]),
        ("x.txt", "0 1  1\n1 0 1 \n", [[-1, 1, 1], [1, -1, 1]]),
        ("x.csv", "\ufeffa,b\n0,1\n", [[-1, 1]]),
    ],
)
def test_tables_are_read_as_spins(save, name, text, expected):
    np.testing.assert_array_equal(read_spins(save(name, text)), np.array(expected, dtype=float))


def test_arrays_are_read_as_spins(save):
    for array in (np.array([[0, 1], [1, 1]]), np.array([[False, True], [True, True]]), np.array([[-1.0, 1], [1, 1]])):
        np.testing.assert_array_equal(read_spins(save("x.npz", npz(data=array))), [[-1, 1], [1, 1]])
    found = read_spins(save("x.npz", npz(X=np.array([[0, np.nan]]), y=np.zeros(3))))
    np.testing.assert_array_equal(found, [[-1, np.nan]])


def test_a_table_of_ones_needs_its_coding(save):
    path = save("x.csv", "a,b\n1,1\n1,\n")
    with pytest.raises(InputError, match=r"every value is 1.* pass coding='01' or coding='pm1'"):
        read_spins(path)
    for coding in ("01", "pm1"):
        np.testing.assert_array_equal(read_spins(path, coding=coding), [[1, 1], [1, np.nan]])


@pytest.mark.parametrize(
    ("name", "content", "coding", "message"),
    [
        ("x.csv", "a,b\n0,1\n0,2\n", "auto", r"x\.csv:3, column 2 is '2'; expected 0/1 or -1/1"),
        ("x.csv", "0,1\n0,yes\n", "auto", r"x\.csv:2, column 2 is 'yes'"),
        ("x.csv", "0,yes\n0,1\n", "auto", r"x\.csv:1, column 2 is 'yes'"),
        ("x.csv", "a,b\n0,0.5\n", "auto", "column 2 is '0.5'"),
        ("x.csv", "a,b\n0,inf\n", "auto", "column 2 is 'inf'"),
        ("x.csv", ',q\n"1",3\n', "auto", "column 2 is '3'"),
        ("x.csv", "a,b\n0,1\n1\n", "auto", r"x\.csv:3: expected 2 columns, as in the first row, got 1"),
        ("x.csv", "a,b\n0,1\n\n1,-1\n", "auto", "line 2, column 1 is 0 but line 4, column 2 is -1"),
        ("x.csv", "a,b\n0,1\n", "pm1", "line 2, column 1 is 0; coding 'pm1' means -1 and 1"),
        ("x.csv", "a,b\n-1,1\n", "01", "line 2, column 1 is -1; coding '01' means 0 and 1"),
        ("x.csv", "a,b\n", "auto", "a header and no row"),
        ("x.csv", "a,b\n,\n", "auto", "not one observed value"),
        ("x.csv", "", "auto", "is empty"),
        ("x.csv", b"a,b\n0,\xe9\n", "auto", "byte 7 is not UTF-8"),
        ("x.npz", npz(X=np.array([[0, 1], [1, 3]])), "auto", r"X\[1,1\] is 3; expected"),
        ("x.npz", npz(X=np.array([[0, 1], [1, -1]])), "auto", r"X\[0,0\] is 0 but X\[1,1\] is -1"),
        ("x.npz", npz(X=np.zeros(3)), "auto", r"X must be numbers, \(rows, n\), got float64 \(3,\)"),
        ("x.npz", npz(X=np.zeros((0, 3))), "auto", "X must be numbers"),
        (
            "x.npz",
            npz(u=np.zeros((1, 1)), v=np.zeros((1, 1))),
            "auto",
            "needs an array X, or one array only; found u, v",
        ),
        ("x.xls", "0,1", "auto", "cannot tell what '.xls' is"),
        ("x.csv", "0,1", "02", "unknown coding '02'"),
    ],
)
def test_a_bad_table_is_refused_with_row_and_column(save, name, content, coding, message, unchecked):
    with pytest.raises(InputError, match=message) as caught:
        read_spins(save(name, content), coding=coding)
    assert "\n" not in str(caught.value)
