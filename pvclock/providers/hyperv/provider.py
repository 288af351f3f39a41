"""The Hyper-V provider: which parts of the interface this VM's guest has, and the dispatch to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final

from pvclock.errors import ConfigError, MsrFault
from pvclock.msr_ranges import MsrRange
from pvclock.providers import timing
from pvclock.providers.calls import each_of
from pvclock.providers.hyperv import virtualbox_unit
from pvclock.providers.hyperv.features import (
    CPUID_VERSION,
    Feature,
    Limits,
    Privilege,
    hyperv_cpuid_leaves,
    with_debug_leaves,
)
from pvclock.providers.hyperv.hypercalls import Hypercalls
from pvclock.providers.hyperv.msr import Part, TimedPart
from pvclock.providers.hyperv.offer import Served, Wanted, chosen_offer
from pvclock.providers.hyperv.page_msr import PAGE_BYTES, page_of
from pvclock.providers.hyperv.partition import HYPERCALL_PORT
from pvclock.providers.hyperv.parts import Choices, Parts
from pvclock.providers.hyperv.profiles import PROFILES
from pvclock.providers.interface import (
    CPUID_BASE,
    ClockServices,
    CpuidLeaf,
    DebugSetup,
    Hooks,
    HypercallRegisters,
    HypercallResult,
    MsrValue,
    Status,
    VcpuHost,
)
from pvclock.quantities import U32_MASK, quoted

__all__ = ["HyperVProvider"]

NAME: Final = "HyperV"
LOGICAL_PROCESSORS: Final = 64


class HyperVProvider:
    """Hyper-V's interface of one VM: reference time, timers and their messages, APIC, hypercalls, debugger, crashes.

    vendor_id: 12 ASCII characters; None for the profile's, "Microsoft Hv" or VirtualBox's "VBoxVBoxVBox".
    privileges, features, recommendations: what CPUID offers, see Privilege, Feature, Recommendation; None for what this
    clock, its vCPU host and its VMM can serve, but for the TSC-invariant control.  hardware: what of the processor the
    VMM uses, see Hardware.
    enforce_cpuid: refuse MSRs and hypercalls that are not offered; False is KVM without KVM_CAP_HYPERV_ENFORCE_CPUID,
    which serves all that it can.
    profile: "linux", "document" or "virtualbox", see pvclock.providers.hyperv.profiles.
    apic_bus_hz: the APIC timer's frequency, as an MSR tells it.  cpu_vendor: of the guest's CPUs, as in CPUID leaf 0:
    it says which instruction the hypercall page holds.
    vs_interface: offer leaves 0x40000080 to 0x40000082, the debug interface's.  hypercall_debug: debug by hypercalls.

    ConfigError for what cannot be served here, naming what can.
    """

    name = NAME
    number = 2
    version = 1
    node_keys: Mapping[str, str] = {
        "VendorID": "vendor_id",
        "VSInterface": "vs_interface",
        "HypercallDebugInterface": "hypercall_debug",
    }
    is_enabled = True
    cpuid_base = CPUID_BASE
    msr_ranges: tuple[MsrRange, ...] = (MsrRange(0x40000000, 0x200, why="Hyper-V's, some of which the kernel has"),)
    allows_stable = False
    refreshes_pages = tells_of_pauses = True
    debug_setup: DebugSetup | None = None

    def __init__(  # noqa: PLR0913  # one for each key of the configuration, all by keyword
        self,
        clock: ClockServices,
        vcpus: int,
        *,
        vendor_id: str | None = None,
        privileges: int | None = None,
        features: int | None = None,
        recommendations: int | None = None,
        hardware: int | None = None,
        enforce_cpuid: bool = True,
        profile: str = "linux",
        apic_bus_hz: int = timing.APIC_BUS_HZ,
        cpu_vendor: str = "GenuineIntel",
        vs_interface: bool = False,
        hypercall_debug: bool = False,
    ) -> None:
        if profile not in PROFILES:
            raise ConfigError(f"profile {quoted(profile)} is unknown; choose from {', '.join(map(repr, PROFILES))}")
        self.clock, self._vcpus, self._profile = clock, vcpus, PROFILES[profile]
        self._options: dict[str, int | bool | str] = {
            "enforce_cpuid": enforce_cpuid,
            "profile": profile,
            "apic_bus_hz": apic_bus_hz,
            "cpu_vendor": cpu_vendor,
            "vs_interface": vs_interface,
            "hypercall_debug": hypercall_debug,
        }
        vendor_id = self._profile.vendor_id if vendor_id is None else vendor_id
        direct_timers = not enforce_cpuid or _offers_direct_timers(self._profile.features, features)
        choices = Choices(vendor_id, apic_bus_hz, cpu_vendor, vs_interface, hypercall_debug, direct_timers)
        self._all = Parts.of(clock, vcpus, self._profile, choices)
        if self._all.debugger is not None:
            self.debug_setup = self._all.debugger.setup
        self._hypercalls = Hypercalls(
            clock,
            vcpus,
            read_msr=self.read_msr,
            debugger=self._all.debugger,
            as_virtualbox=self._profile.is_virtualbox,
            vs_interface=vs_interface,
        )
        served = Served.by(self._all.every, self._hypercalls)
        wanted = Wanted(vendor_id, privileges, features, recommendations, hardware)
        self.offer = chosen_offer(self._profile, served, wanted)
        """What CPUID offers."""
        self._take_up(Served(self.offer.privileges, self.offer.features) if enforce_cpuid else served)
        if enforce_cpuid:
            self._hypercalls.deny_all_but(self.offer.privileges, self.offer.recommendations)
        self._unit_features = self._features_of_unit()
        self._leaves = self._made_leaves(vs_interface=vs_interface)
        self.hypercall_opcodes: tuple[bytes, ...] = (self._all.partition.opcode,)
        self.hypercall_port: int | None = HYPERCALL_PORT if clock.vcpu_host is VcpuHost.KVM else None

    def _take_up(self, served: Served) -> None:
        """Serve the MSRs that are `served`, and what is due of the parts that have any."""
        parts = [part for part in self._all.every if any(served.has(msr.privilege) for msr in part.msrs.values())]
        self._parts: tuple[Part, ...] = tuple(parts)
        self._msrs = {index: msr for part in parts for index, msr in part.msrs.items() if served.has(msr.privilege)}
        self._timed: tuple[TimedPart, ...] = tuple(part for part in parts if isinstance(part, TimedPart))
        self.hooks = Hooks(next_due_ns=self._next_due_ns, expire=self._expire) if self._timed else Hooks()

    def _made_leaves(self, *, vs_interface: bool) -> Mapping[int, CpuidLeaf]:
        limits = Limits(self._vcpus, LOGICAL_PROCESSORS) if self._profile.tells_limits else Limits()
        leaves = hyperv_cpuid_leaves(self.offer, limits, self._profile.last_leaf)
        return with_debug_leaves(leaves) if vs_interface else leaves

    # CPUID

    @property
    def cpuid_leaves(self) -> Mapping[int, CpuidLeaf]:
        """See hyperv_cpuid_leaves(); by profile, the version is shown once the guest has said its OS id."""
        if self._profile.version_needs_os_id and not self._all.partition.guest_os_id:
            return {**self._leaves, CPUID_VERSION: CpuidLeaf()}
        return self._leaves

    @property
    def guest_lives_by_tsc(self) -> bool:
        """Only with the TSC-invariant control: Linux then prefers its TSC to the reference TSC page.

        Without it the frequency MSR is no reason: the page is the clock, and Reenlightenment tells a new frequency.
        """
        return Privilege.TSC_INVARIANT in self.offer.privileges

    @property
    def shows_invariant_tsc(self) -> bool:
        """With the TSC-invariant control, only once the guest has used it."""
        return not self.guest_lives_by_tsc or bool(self._all.invariant_tsc.control)

    @property
    def warnings(self) -> tuple[str, ...]:
        """See Provider."""
        if not self.guest_lives_by_tsc:
            return ()
        return ("the TSC-invariant control is offered; a guest that goes by its TSC leaves every policy of this clock",)

    # MSRs

    def read_msr(self, vcpu: int, index: int) -> int:
        """See Provider."""
        msr = self._msrs.get(index)
        if msr is None:
            raise MsrFault(index)
        if msr.read is None:
            raise MsrFault(index, why="it cannot be read")
        return msr.read(vcpu)

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """See Provider."""
        msr = self._msrs.get(index)
        if msr is None:
            raise MsrFault(index, value)
        if msr.write is None:
            raise MsrFault(index, value, "it cannot be written")
        msr.write(vcpu, value)

    # Hypercalls

    @property
    def are_hypercalls_enabled(self) -> bool:
        """Once the guest has said its OS id; by profile, while it also has a hypercall page."""
        return self._all.partition.are_hypercalls_enabled

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """NOT_ENABLED, the guest's #UD, until hypercalls are enabled; then see Hypercalls."""
        if not self.are_hypercalls_enabled:
            return HypercallResult(Status.NOT_ENABLED)
        return self._hypercalls.call(vcpu, registers)

    # Pages and time

    def own_page(self, vcpu: int) -> None:
        """There are no pvclock pages."""

    @property
    def is_paravirt_tsc_enabled(self) -> bool:
        """While the reference TSC page is enabled."""
        return self._all.reference.is_page_enabled

    def update_paravirt_tsc(self) -> Status:
        """Nothing to do: the clock publishes the page, or by profile nobody does."""
        return Status.SUCCESS if self.is_paravirt_tsc_enabled else Status.NOT_ENABLED

    def _next_due_ns(self) -> int | None:
        return min((due for part in self._timed if (due := part.next_due_ns()) is not None), default=None)

    def _expire(self, now_ns: int) -> Callable[[], object] | None:
        return each_of(*[part.expire(now_ns) for part in self._timed])

    # Life

    @property
    def config(self) -> Mapping[str, int | bool | str]:
        """The options that make another one like it."""
        return {**self._plain_offer(), **self._options}

    def _plain_offer(self) -> dict[str, int | bool | str]:
        return {name: int(each) if isinstance(each, int) else each for name, each in self.offer._asdict().items()}

    def reset(self) -> None:
        """Go back to the state before any write, and take the reference TSC page back."""
        others = [part for part in self._parts if part is not self._all.reference]
        undo = [part.checked(part.save()) for part in others]
        self._all.reference.go_back_to(0, partial(_call_all, [part.reset for part in others]), partial(_call_all, undo))

    def save(self) -> Mapping[str, MsrValue]:
        """The guest's writes, and the reference time that no later reading may be less than."""
        return {name: value for part in self._parts for name, value in part.save().items()}

    def load(self, msrs: Mapping[str, object]) -> None:
        """Adopt what save() returned; reference time and its page go on from there."""
        _call_all(self._checked(msrs))

    def _checked(self, msrs: Mapping[str, object]) -> list[Callable[[], None]]:
        saved = [part.save() for part in self._parts]
        names = [name for each in saved for name in each]
        if msrs.keys() != set(names):
            raise ConfigError(
                f"provider 'HyperV' has saved {', '.join(map(repr, names))}; "
                f"found were {', '.join(f'{name!r:.100}' for name in list(msrs)[:64]) or 'none'}"
            )
        return [
            part.checked({name: msrs[name] for name in each}) for part, each in zip(self._parts, saved, strict=True)
        ]

    def save_unit(self) -> bytes:
        """See virtualbox_unit."""
        return virtualbox_unit.encode(virtualbox_unit.unit_of(self.save(), self._unit_features, self._vcpus))

    def load_unit(self, part: bytes, begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """See Provider; what a unit does not hold is as after a reset.

        ConfigError for a page that cannot be enabled; and, but for profile "virtualbox", for another offer in CPUID.
        """
        found = virtualbox_unit.decode(part, self._vcpus)
        self._check_unit(found)
        written, features = virtualbox_unit.written_in(found), self._unit_features
        self._checked(self._with_written(written))  # refuses what no guest can have written, while nothing has changed
        restore = [each.checked(each.save()) for each in self._parts]

        def take() -> None:
            _call_all([each.reset for each in self._parts])
            self.load(self._with_written(written))
            self._unit_features = found.features
            begin()

        def take_back() -> None:
            undo()
            self._unit_features = features
            _call_all(restore)

        self._all.reference.go_back_to(found.reference_tsc, take, take_back)

    def _with_written(self, written: Mapping[str, MsrValue]) -> Mapping[str, MsrValue]:
        """The state as it is, but for what is `written`; a sequence never goes back."""
        now = self.save()
        state = {name: written.get(name, value) for name, value in now.items()}
        match now.get("reference_sequence"), written.get("reference_sequence"):
            case (int(here), int(there)):
                state["reference_sequence"] = max(here, there)
        return state

    def _check_unit(self, found: virtualbox_unit.Unit) -> None:
        here = self._features_of_unit()
        if found.features != here and not self._profile.is_virtualbox:
            raise ConfigError(f"the unit's guest was offered {_words(found.features)}; this VM offers {_words(here)}")
        pages = {"hypercall page": found.hypercall}
        if self._profile.reference_is_raw_tsc:  # otherwise the page may lie anywhere
            pages["TSC page"] = found.reference_tsc
        for name, msr in pages.items():
            if (gpa := page_of(msr)) is not None and not self.clock.memory.contains(gpa, PAGE_BYTES):
                raise ConfigError(f"failed to enable the {name} at {gpa:#x}: it is not in guest memory")

    def _features_of_unit(self) -> tuple[int, ...]:
        """CPUID's words as a unit has them: privileges low and high, power management, features, hints, hardware."""
        privileges, offer = int(self.offer.privileges), self.offer
        low, high = privileges & U32_MASK, privileges >> 32
        return low, high, 0, int(offer.features), int(offer.recommendations), int(offer.hardware)


def _offers_direct_timers(default: int, features: int | None) -> bool:
    return bool(Feature.DIRECT_TIMERS & (default if features is None else features))


def _words(features: tuple[int, ...]) -> str:
    return ", ".join(f"{each:#x}" for each in features)


def _call_all(functions: Iterable[Callable[[], object]]) -> None:
    for function in functions:
        function()
