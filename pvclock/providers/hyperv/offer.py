"""Which privileges, features and recommendations a guest is offered, of those that can be served here.

Source: TLFS "Minimal Set of Features"; QEMU's hv-* properties; VirtualBox gimR3HvInit().
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple, TypeVar

from pvclock.errors import ConfigError
from pvclock.providers.hyperv.features import MICROSOFT, Feature, Hardware, Offer, Privilege, Recommendation, names_of
from pvclock.providers.hyperv.hypercalls import Hypercalls
from pvclock.providers.hyperv.msr import Part
from pvclock.providers.hyperv.profiles import Profile
from pvclock.quantities import quoted

__all__ = ["Served", "Wanted", "chosen_offer"]

MANDATORY: Final = Privilege.HYPERCALL | Privilege.VP_INDEX
"""Guests take nothing for Hyper-V's interface that lacks them."""

FEATURES_OF: Final[Mapping[Privilege, Feature]] = {
    Privilege.FREQUENCY: Feature.FREQUENCY,
    Privilege.SYNTHETIC_TIMERS: Feature.DIRECT_TIMERS,
    Privilege.DEBUGGING: Feature.DEBUG,
}
"""Features that are served to every guest that has a privilege, and to no other."""

PRIVILEGE_FOR: Final[Mapping[Recommendation, Privilege]] = {
    Recommendation.APIC_BY_MSR: Privilege.APIC,
    Recommendation.RESET_BY_MSR: Privilege.RESET,
    Recommendation.DEPRECATE_AUTO_EOI: Privilege.SYNIC,
}
"""What a guest needs to do as recommended; nothing for the other recommendations."""

BY_HYPERCALL: Final = Recommendation.CLUSTER_IPI | Recommendation.EX_PROCESSOR_MASKS
"""Recommendations of hypercalls that need no privilege."""

VENDOR_ID_CHARS: Final = 12

Bits = TypeVar("Bits", Privilege, Feature, Recommendation, Hardware)


class Wanted(NamedTuple):
    """What a configuration asks for; None for the default."""

    vendor_id: str | None
    privileges: int | None
    features: int | None
    recommendations: int | None
    hardware: int | None


class Served(NamedTuple):
    """What some parts serve, or what of it a guest may use."""

    privileges: Privilege
    features: Feature
    recommendations: Recommendation = Recommendation(0)
    """Those of hypercalls."""

    @classmethod
    def by(cls, parts: Iterable[Part], hypercalls: Hypercalls) -> Served:
        """What the MSRs of these parts need, and the hypercalls."""
        needed = [msr.privilege for part in parts for msr in part.msrs.values()]
        privileges = Privilege(sum({each for each in needed if isinstance(each, Privilege)})) | hypercalls.privileges
        features = Feature(sum({each for each in needed if isinstance(each, Feature)} | set(FEATURES_OF.values())))
        return cls(privileges, features, hypercalls.recommendations)

    def has(self, needed: Privilege | Feature) -> bool:
        """Is that among them?"""
        return bool(needed & (self.features if isinstance(needed, Feature) else self.privileges))


def chosen_offer(profile: Profile, served: Served, wanted: Wanted) -> Offer:
    """What the guest is offered; ConfigError for what is not `served`, or lacks what is mandatory."""
    vendor_id = _checked_vendor_id(profile.vendor_id if wanted.vendor_id is None else wanted.vendor_id)
    privileges, features = profile.privileges, profile.features
    if vendor_id == MICROSOFT:
        privileges, features = privileges | profile.microsoft_privileges, features | profile.microsoft_features
    privileges = _chosen("privileges", wanted.privileges, privileges, served.privileges)
    if MANDATORY not in privileges:
        lacking = names_of(Privilege, int(MANDATORY) & ~int(privileges))
        raise ConfigError(f"privileges {names_of(Privilege, privileges)} lack {lacking}, which every guest needs")
    return Offer(
        vendor_id,
        privileges,
        _chosen("features", wanted.features, features, _usable(privileges, served.features)),
        _chosen("recommendations", wanted.recommendations, profile.recommendations, _can_do(privileges, served)),
        _chosen("hardware", wanted.hardware, profile.hardware, Hardware(sum(Hardware))),
    )


def _usable(privileges: Privilege, features: Feature) -> Feature:
    """Those of the features that are of use to a guest with these privileges."""
    return features & ~Feature(sum(of for needed, of in FEATURES_OF.items() if needed not in privileges))


def _can_do(privileges: Privilege, served: Served) -> Recommendation:
    """The recommendations that a guest with these privileges can follow."""
    by_privilege = {each for each in Recommendation if PRIVILEGE_FOR.get(each, MANDATORY) in privileges}
    return Recommendation(sum(by_privilege) & ~BY_HYPERCALL) | served.recommendations


def _chosen(what: str, given: int | None, default: Bits, servable: Bits) -> Bits:
    kind = type(servable)
    if given is None:
        return kind(int(default) & int(servable))
    if given & ~int(servable):  # ints: ~ of an IntFlag has only the bits that have names
        refused, choice = names_of(kind, given & ~int(servable)), names_of(kind, int(servable))
        raise ConfigError(f"{what} {refused} cannot be served here; choose from {choice}")
    return kind(given)


def _checked_vendor_id(vendor_id: str) -> str:
    if len(vendor_id) != VENDOR_ID_CHARS or not vendor_id.isascii():
        raise ConfigError(f"vendor_id {quoted(vendor_id)}; it is exactly {VENDOR_ID_CHARS} ASCII characters")
    return vendor_id
