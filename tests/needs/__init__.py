"""What needs more than torch: a device, processes, trainers."""
