"""Makes vLLM on a CPU compile as it does on a GPU; loaded by vLLM as a plugin, in all of its processes.

On a CPU vLLM replaces its own compile mode by a plain one, calls its all-reduce without its operator, and sums in place.
Here the mode and the operator are those of a GPU, and the sum goes out of place, as it does there.

``TPFUSE_TEST_VLLM_GPU_LIKE=gloo`` changes one thing alone: the ranks do not find each other's shared memory, so vLLM sums with
``torch.distributed``, as it does on CPUs for which it has no operator of its own.
"""

from __future__ import annotations

import os


def register() -> None:
    how = os.environ.get("TPFUSE_TEST_VLLM_GPU_LIKE")
    if how == "gloo":
        from vllm.distributed.device_communicators import cpu_communicator

        cpu_communicator.CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
    if how != "1":
        return
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if "original_check" in vars(platform):
        return
    platform.original_check = platform.check_and_update_config

    def check(cls, config):
        compilation = config.compilation_config
        mode, wrap = compilation.mode, compilation.ir_enable_torch_wrap
        method = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD")
        cls.original_check(config)
        if method is not None:  # on a CPU vLLM overwrites it: all workers would be spawned, whatever was asked for
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = method
        compilation.mode, compilation.ir_enable_torch_wrap, compilation.compile_sizes = mode, wrap, []

    def all_reduce(self, input_):
        out = input_.clone()
        self.dist_module.all_reduce(out, group=self.device_group)
        return out

    platform.check_and_update_config = classmethod(check)
    platform.use_custom_op_collectives = classmethod(lambda cls: True)
    CpuCommunicator.all_reduce = all_reduce
    # It names operators that a CPU build does not have; Inductor removes the functionalization itself.
    FixFunctionalizationPass.__call__ = lambda self, graph: None
