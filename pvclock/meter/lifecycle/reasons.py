"""The rule of each row of the life-cycle cross-check, and why the clocks differ in it."""

from __future__ import annotations

from typing import Final

from pvclock.meter.lifecycle.operations import Kind

__all__ = ["REASONS"]

ONE_LINE: Final = "Afterwards all vCPUs' lines are one"
UNSTABLE: Final = "Not judged without STABLE, where KVM moves guests' TSCs"
BOOTED_ANEW: Final = "from the last reading before to the first one after, the boot included, and never below 0"
ALL_ALIKE: Final = "the same for all vCPUs, as their TSCs are to agree"

WHOLE: Final = "none: a page may be late, but is never half of one and half of another, nor one of another TSC"

STOP: Final = {
    "step against the TSC": "new line less old line at the new tsc_timestamp.  Engine and QEMU take out the time "
    "stopped: at least from stop answered to cont asked for, at most from stop asked for to cont answered.  The "
    "kernel's clock goes on, for it leaves that to its VMM: a difference by design.  KVM's clocks also drift by up "
    f"to 1 ppm between two anchors.  {ONE_LINE}.  {UNSTABLE}",
    "guest time meanwhile": "how far the guest's clock went on while no vCPU ran: the stop, which took at least and "
    "at most so long, less what the guest's readings before and after left out of the host's time.  Engine and QEMU: "
    f"0 is within; the kernel's: the whole stop.  {UNSTABLE}",
    "largest gap between readings": "of each vCPU since it was stopped, by the guest's clock.  The kernel's: at "
    "least the longest stop.  In QEMU a vCPU that enters before vCPU 0 reads that one's page as it was before the "
    "stop, and jumps ahead by the whole stop; the engine changes all pages before any vCPU enters.  On a busy host "
    "vCPUs wait, so at most what the vCPU's clock counted in all, and in QEMU the stop",
    "readings that went back": "none with engine and kernel, nor with one vCPU.  In QEMU up to the time stopped: KVM "
    "brings a page up to date when its vCPU next enters the guest, so another that entered before it has read vCPU "
    "0's old page (as every vDSO does), ahead by the stop, and then goes back.  `own` counts readings below the "
    "vCPU's last, `cross` those below the newest of any vCPU, so one old page makes many",
    "readings wild or torn": WHOLE,
    "GUEST_STOPPED seen": "how often by each vCPU, which then clears it.  Engine and QEMU (KVM_KVMCLOCK_CTRL at "
    "cont): at least once; not as often as it was stopped, if it was stopped again before it looked.  The kernel's "
    "clock in our machine: never, for that does not make this call",
    "versions": "even.  The engine's and QEMU's advance, by 2 for each publish; in QEMU less often than it was "
    "stopped, for KVM publishes when the vCPU enters, and it may not have entered between two stops",
    "TSC offset moved by": "0: neither stop nor cont writes a guest's TSC.  Of QEMU it is debugfs that tells, or not",
    "wall clock afterwards": "wall clock record and guest's time against CLOCK_REALTIME: late by what was left out, "
    "for neither engine nor KVM writes a record that the guest has not registered again",
}
RESET: Final = {
    "step against the TSC": "none by the host's TSC: guest time goes on, in QEMU, too, for KVM's clock is the VM's "
    "and not the boot's.  That the guest's TSC begins anew is taken out where offsets can be read, else the step is "
    f"unknown.  {ONE_LINE}.  {UNSTABLE}",
    "guest time meanwhile": "how much more than the host's time the guest's clock counted over the reset, by its "
    f"readings: 0 is within.  {UNSTABLE}",
    "largest gap between readings": BOOTED_ANEW,
    "readings that went back": "none: each page is registered, and so published, after the reset",
    "readings wild or torn": WHOLE,
    "GUEST_STOPPED seen": "never: nobody was stopped, and QEMU's system_reset is no stop and cont",
    "versions": "even.  The guest that boots anew goes on from what its RAM holds there: our machine clears RAM, "
    "QEMU leaves it to the guest",
    "TSC offset moved by": f"{ALL_ALIKE}.  The TSC begins anew with the engine and in QEMU, so its offset goes back "
    "by what the TSC was; QEMU writes 1, for KVM takes a 0 as a wish to join the other vCPUs, and takes what is "
    "within 1 s of the TSC it expects for that, so a guest younger than 1 s keeps its offset.  The kernel's clock in "
    "our machine: it goes on.  No kvmclock depends on it, for the page says where its line begins.  0 on a host that "
    "honours no offsets",
    "wall clock afterwards": "right within 1 ms, for the guest registers its record again; KVM's up to 50 ms early, "
    "as it may read two clocks at two instants",
}
LOAD: Final = {
    "step against the TSC": "engine and QEMU leave out the time from stop to cont, saving and loading included; QEMU "
    "sets the saved clock at cont.  Unknown where offsets cannot be read, for the load sets the TSC, too.  "
    f"{ONE_LINE}.  {UNSTABLE}",
    "guest time meanwhile": "0 is within, as with stop and cont.  QEMU's guest runs on where it was; Machine.save() "
    f"has the clock and not the vCPUs, so the loaded clock serves a clockprobe that boots anew.  {UNSTABLE}",
    "largest gap between readings": f"QEMU's: as with stop and cont.  The engine's: {BOOTED_ANEW}",
    "readings that went back": "none with the engine, nor with one vCPU; in QEMU as with stop and cont",
    "readings wild or torn": WHOLE,
    "GUEST_STOPPED seen": "by each vCPU: the engine restores a clock that was stopped, QEMU tells KVM at cont",
    "versions": "even.  KVM publishes as QEMU loads the MSRs and as it sets the clock",
    "TSC offset moved by": f"{ALL_ALIKE}.  Both let the TSC go on from where it was saved, so its offset goes back by "
    "about the time stopped; 0 on a host that honours no offsets",
    "wall clock afterwards": "the engine's is right, for the guest that boots anew registers its record.  KVM writes "
    "QEMU's record as the load sets the wall clock's MSR, by the new VM's clock, which has just begun; cont sets "
    "that clock to the saved time, and leaves the record off by the difference.  A running Linux reads it after a "
    "sleep only",
}

REASONS: Final = {Kind.STOP: STOP, Kind.RESET: RESET, Kind.LOAD: LOAD}
"""By kind of operation and name of the row."""
