"""Started by the deepspeed launcher on each host: adds up one number per rank and says where it ran."""

import socket

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
interfaces = sorted(name for _, name in socket.if_nameindex())
print(f"rank {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()} {interfaces} sum {total.item():g}")
dist.destroy_process_group()
