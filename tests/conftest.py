"""Sets up eight virtual CPU devices for all tests, and defines small parts that many of them share."""

import gc
import importlib.metadata
import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Most of the time of the tests is spent on compilation.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# A train step compiles in half the time without XLA's newer emitters, and as one module instead of 32. XLA aborts on
# unknown flags, so these are set only for the versions that have them.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
os.environ["EPATH_USE_TF"] = (
    "0"  # access buckets by fsspec, which the tests can replace, even if TensorFlow is installed
)
# All processes of a session, including the jobs that tests start, share one compilation cache. `.ci/run` gives its own,
# which all its sessions share.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.distributed.mesh import AXES

# Traces consist of many long-lived objects. Collecting garbage less often saves a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 20)


@pytest.fixture
def x64():
    """Enables float64, for tests that check formulas to 1e-12."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def digits():
    return build("data", "digits")


@pytest.fixture(scope="session")
def tiny_unet(digits):
    """Returns a U-Net for 8x8 digits that compiles in seconds."""
    spec = {
        "name": "unet",
        "width": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
        "head_dim": 8,
    }
    return build("networks", spec, shape=digits.spec.shape, num_classes=digits.spec.num_classes)


@pytest.fixture(scope="session")
def tiny_mlp(digits):
    """Returns an MLP, with a tenth of the U-Net's arrays and compilation time, for tests that train any network."""
    spec = {"name": "mlp", "width": 8, "depth": 1}
    return build("networks", spec, shape=digits.spec.shape, num_classes=digits.spec.num_classes)


@pytest.fixture(scope="session")
def tiny_params(tiny_unet):
    """Returns parameters of the U-Net, none of them zero, so that every input matters."""
    return nonzero(tiny_unet)


@pytest.fixture(scope="session")
def mlp_params(tiny_mlp):
    """Returns parameters of the MLP, none of them zero, so that every input matters."""
    return nonzero(tiny_mlp)


def nonzero(network):
    params = jax.jit(network.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    return {"net": jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)}


@pytest.fixture(scope="session")
def ddpm():
    return build("objectives", {"name": "denoising"})


@pytest.fixture(scope="session")
def digits_batch(digits):
    """Returns a batch of sixteen digits."""
    examples = [digits[i] for i in range(16)]
    return {
        "x": jnp.stack([e["x"] for e in examples]),
        "cond": {"label": jnp.stack([e["cond"]["label"] for e in examples])},
    }


@pytest.fixture(scope="session")
def mesh_of():
    """Returns `mesh_of(data, fsdp, model)`, which makes a mesh over as many of the first devices as necessary."""

    def make(*sizes: int) -> jax.sharding.Mesh:
        devices = jax.devices()[: int(np.prod(sizes))]
        kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
        return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)

    return make
