"""Image attention: put in, taken out, and weighed at run time."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from ip_adapter.names import image_attention_torch
from ip_adapter.patch import patch_cross_attention, set_ip_scale, transformer_blocks, unpatch_cross_attention
from ldm.checkpoints.loading import parameter_shapes
from ldm.model import GuidedDenoiser
from ldm.modules.unet import UNetConfig, UNetModel

SMALL = UNetConfig(model_channels=32, channel_mult=(1, 2), transformer_depth=(1, 1), num_res_blocks=1, context_dim=16)
RNG = np.random.default_rng(0)
X, T = Tensor(RNG.standard_normal((2, 4, 8, 8)).astype(np.float32)), Tensor([400.0, 400.0])
TEXT = Tensor(RNG.standard_normal((2, 7, 16)).astype(np.float32))
IMAGE = Tensor(RNG.standard_normal((2, 4, 16)).astype(np.float32))


@pytest.fixture
def unet():
    return UNetModel(SMALL)


def test_scale_0_equals_text_only_bit_for_bit(unet):
    plain = unet(X, T, TEXT).asnumpy()
    patch_cross_attention(unet, 4)
    both = ms.ops.concat((TEXT, IMAGE), 1)
    assert not np.allclose(unet(X, T, both).asnumpy(), plain, atol=1e-4)
    set_ip_scale(unet, 0.0)
    np.testing.assert_array_equal(unet(X, T, both).asnumpy(), plain)


def test_unpatching_restores_names_and_output(unet):
    names, plain = list(parameter_shapes(unet).items()), unet(X, T, TEXT).asnumpy()
    patch_cross_attention(unet, 4)
    assert len(parameter_shapes(unet)) == len(names) + 2 * len(list(transformer_blocks(unet)))
    unpatch_cross_attention(unet)
    assert sorted(parameter_shapes(unet).items()) == sorted(names)
    np.testing.assert_array_equal(unet(X, T, TEXT).asnumpy(), plain)


def test_patching_twice_is_a_mistake(unet):
    patch_cross_attention(unet)
    with pytest.raises(AssertionError, match="patched already"):
        patch_cross_attention(unet)


def test_layers_are_counted_as_published_files_do():
    unet = UNetModel(UNetConfig(model_channels=32, context_dim=16))
    paths = [path for path, _ in transformer_blocks(unet)]
    assert len(paths) == 16 and paths[0].startswith("input_blocks.1.1.") and paths[-1].startswith("middle_block.1.")
    layout = image_attention_torch(paths)
    assert layout.source(paths[6] + ".attn2.to_k_ip.weight").names == ("ip_adapter.13.to_k_ip.weight",)
    assert paths[6].startswith("output_blocks.3.1.")


@pytest.mark.slow
def test_the_scale_changes_without_a_recompilation(unet):
    patch_cross_attention(unet, 4)
    guided, both = GuidedDenoiser(unet), ms.ops.concat((TEXT, IMAGE), 1)
    scale, step = Tensor(2.0, ms.float32), Tensor(300.0, ms.float32)
    results = {}
    for mode in (ms.PYNATIVE_MODE, ms.GRAPH_MODE):
        ms.set_context(mode=mode)
        try:
            for ip_scale in (1.0, 0.0, 0.5):
                set_ip_scale(unet, ip_scale)
                results[mode, ip_scale] = guided(X[:1], step, both, scale)[0].asnumpy()
        finally:
            ms.set_context(mode=ms.PYNATIVE_MODE)
    for ip_scale in (1.0, 0.0, 0.5):
        np.testing.assert_allclose(results[ms.GRAPH_MODE, ip_scale], results[ms.PYNATIVE_MODE, ip_scale], atol=1e-4)
    assert not np.allclose(results[ms.GRAPH_MODE, 1.0], results[ms.GRAPH_MODE, 0.5], atol=1e-3)
    assert len(guided.compile_cache) == 1
