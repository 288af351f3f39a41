"""What VirtualBox's guest interface manager has beside its providers: saved unit, debug channel."""
