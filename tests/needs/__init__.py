"""What needs more than torch: a device, processes, trainers, whole models of others, the pages."""
