"""Guest-visible clock interfaces; `guest_interface.py` chooses one for a VM's life."""
