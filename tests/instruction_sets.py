"""Has Inductor find out what the processor can do, where it is imported.

It asks by loading libraries in processes of their own, which import PyTorch for that: many seconds
in each process that compiles. Ranks are forked from one that has imported this, and know.
"""

from torch._inductor.cpu_vec_isa import valid_vec_isa_list

valid_vec_isa_list()
