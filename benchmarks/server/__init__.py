"""What training with a server does and costs, on real ranks; each experiment is a module that every rank runs."""
