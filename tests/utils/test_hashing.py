from __future__ import annotations

import hashlib

import pytest
import torch

from lightning_nrl._utils.state import hash_tensors

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


def test_hash_is_sha256_of_name_dtype_shape_and_bytes() -> None:
    tensor = torch.tensor([[1.5, -2.0]])
    expected = hashlib.sha256(b"w\0torch.float32\0(1, 2)\0" + tensor.numpy().tobytes()).hexdigest()
    assert hash_tensors({"w": tensor}) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hash_takes_every_dtype_and_sees_one_value(dtype: torch.dtype) -> None:
    x = torch.ones(3, 2).to(dtype)
    y = x.clone()
    y[2, 1] = 0
    assert hash_tensors({"w": x}) == hash_tensors({"w": x.clone()}) != hash_tensors({"w": y})


def test_hash_tells_names_shapes_and_dtypes_apart() -> None:
    x = torch.zeros(2, 2)
    tensors = [{"w": x}, {"v": x}, {"w": x.flatten()}, {"w": x.int()}, {"w": x, "v": x}, {"w": -x}, {}]
    assert len({hash_tensors(each) for each in tensors}) == len(tensors)


def test_hash_ignores_order_strides_and_gradients() -> None:
    x, y = torch.arange(6.0).view(2, 3), torch.tensor(1.0)
    other = torch.nn.Parameter(x.t().contiguous().t())
    assert not other.is_contiguous()
    assert hash_tensors({"x": x, "y": y}) == hash_tensors({"y": y, "x": other})


def test_hash_takes_scalars_and_empty_tensors_and_leaves_out_what_is_no_tensor() -> None:
    tensors = {"scalar": torch.tensor(3), "empty": torch.zeros(0, 4)}
    assert hash_tensors(tensors | {"_extra_state": {"version": 2}}) == hash_tensors(tensors)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_hash_takes_sparse_tensors_and_sees_values_and_places(layout: torch.layout) -> None:
    dense = [
        torch.tensor(rows) for rows in ([[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 3.0]], [[1.0, 2.0], [0.0, 0.0]])
    ]
    first, *others = (hash_tensors({"w": x.to_sparse(layout=layout)}) for x in (dense[0], *dense))
    assert others[0] == first
    assert len(set(others)) == 3
