"""Eight virtual CPU devices for all tests, and the small parts that many of them share."""

import gc
import importlib.metadata
import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Most of the tests' time is compiling, and hardly any running.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# A train step's kernels are made in half the time without XLA's newer emitters, and as one module, not as 32. XLA ends
# the process at a flag that it does not know, so this is for the versions that do.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
os.environ["EPATH_USE_TF"] = "0"  # buckets are fsspec's, which has a stand-in, even where TensorFlow is installed
# Whatever is compiled once in a session, in this process, in one beside it or in a job that a test starts, is not
# compiled again.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.distributed.mesh import AXES

# Traces are many objects of which nearly all live on: to look through them again and again is a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 20)


@pytest.fixture
def x64():
    """float64 for tests that hold formulas to 1e-12."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def digits():
    return build("data", "digits")


@pytest.fixture(scope="session")
def tiny_unet(digits):
    """A U-Net of 8x8 digits that compiles in seconds."""
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
    """For tests that train without looking at the network: a tenth of the U-Net's arrays, and of its compilation."""
    spec = {"name": "mlp", "width": 8, "depth": 1}
    return build("networks", spec, shape=digits.spec.shape, num_classes=digits.spec.num_classes)


@pytest.fixture(scope="session")
def tiny_params(tiny_unet):
    """Parameters with nothing left at zero, so that every input matters."""
    params = jax.jit(tiny_unet.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    return {"net": jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)}


@pytest.fixture(scope="session")
def ddpm():
    return build("objectives", {"name": "denoising"})


@pytest.fixture(scope="session")
def digits_batch(digits):
    """Sixteen digits."""
    examples = [digits[i] for i in range(16)]
    return {
        "x": jnp.stack([e["x"] for e in examples]),
        "cond": {"label": jnp.stack([e["cond"]["label"] for e in examples])},
    }


@pytest.fixture(scope="session")
def mesh_of():
    """`mesh_of(data, fsdp, model)`: a mesh over the first devices, as many as it takes."""

    def make(*sizes: int) -> jax.sharding.Mesh:
        devices = jax.devices()[: int(np.prod(sizes))]
        kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
        return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)

    return make
