"""One ``nn.Module`` per attention method, one file each, one signature."""
