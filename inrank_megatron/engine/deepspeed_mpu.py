"""The process groups as DeepSpeed asks for them."""

import torch.distributed as dist

from inrank_megatron.distributed.process_groups import Parallel, pipeline_group


class DeepSpeedMPU:
    """What DeepSpeed asks of a model-parallel unit, answered from ``Parallel``.

    It must not define ``initialize_sequence_parallel`` nor ``get_sequence_*``: DeepSpeed takes
    their presence for its own Ulysses sequence parallelism.
    """

    def __init__(self, parallel: Parallel):
        self._parallel = parallel

    def get_tensor_model_parallel_group(self):
        return self._parallel.tp_group

    def get_tensor_model_parallel_world_size(self):
        return self._parallel.tp_size

    def get_tensor_model_parallel_rank(self):
        return self._parallel.tp_rank

    def get_tensor_model_parallel_src_rank(self):
        return dist.get_process_group_ranks(self._parallel.tp_group)[0]

    # Without pipeline parallelism the model-parallel group is the tensor-parallel group.
    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_rank = get_tensor_model_parallel_rank

    def get_data_parallel_group(self):
        return self._parallel.dp_group

    def get_data_parallel_world_size(self):
        return self._parallel.dp_size

    def get_data_parallel_rank(self):
        return self._parallel.dp_rank

    def get_data_parallel_group_ranks(self):
        return dist.get_process_group_ranks(self._parallel.dp_group)

    def get_pipeline_model_parallel_world_size(self):
        return 1

    def get_pipeline_model_parallel_group(self):
        return pipeline_group()
