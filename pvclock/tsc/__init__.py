"""Time stamp counters: a vCPU's own, several vCPUs' agreement, and KVM's synchronization of them."""
