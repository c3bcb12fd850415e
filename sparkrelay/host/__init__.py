"""What this machine, or the container around this process, has to give: memory and cores. Files in, plain values out."""
