"""Plumbing around nn.Module: names, changes that are put back, torch.compile."""
