//! System calls of memory: `mmap(2)` and its family.

use alloc::sync::Arc;

use kiln_abi::host::{PAGE_SIZE, Protection};
use linux_raw_sys::general as linux;

use super::{Call, Entry, Outcome};
use crate::{
    Errno, Result,
    memory::{AreaFile, AreaFlags, Placement, page_round_up, user},
    trace,
};

/// The supported calls.
pub const CALLS: &[Entry] = &[
    Entry {
        number: linux::__NR_mmap,
        name: "mmap",
        handler: mmap,
        limits: "no PROT_WRITE together with PROT_EXEC; a shared mapping of a volume's file does not see what the host writes meanwhile; MAP_HUGETLB: ENOMEM",
    },
    Entry {
        number: linux::__NR_munmap,
        name: "munmap",
        handler: munmap,
        limits: "",
    },
    Entry {
        number: linux::__NR_mprotect,
        name: "mprotect",
        handler: mprotect,
        limits: "no PROT_WRITE together with PROT_EXEC",
    },
    Entry {
        number: linux::__NR_mremap,
        name: "mremap",
        handler: mremap,
        limits: "no MREMAP_DONTUNMAP",
    },
    Entry {
        number: linux::__NR_madvise,
        name: "madvise",
        handler: madvise,
        limits: "no MADV_REMOVE, MADV_HWPOISON",
    },
    Entry {
        number: linux::__NR_brk,
        name: "brk",
        handler: brk,
        limits: "",
    },
    Entry {
        number: linux::__NR_msync,
        name: "msync",
        handler: msync,
        limits: "",
    },
    Entry {
        number: linux::__NR_mincore,
        name: "mincore",
        handler: mincore,
        limits: "mapped pages count as resident",
    },
    Entry {
        number: linux::__NR_mlock,
        name: "mlock",
        handler: mlock,
        limits: "nothing is ever swapped out",
    },
    Entry {
        number: linux::__NR_mlock2,
        name: "mlock2",
        handler: mlock,
        limits: "nothing is ever swapped out",
    },
    Entry {
        number: linux::__NR_munlock,
        name: "munlock",
        handler: mlock,
        limits: "nothing is ever swapped out",
    },
    Entry {
        number: linux::__NR_mlockall,
        name: "mlockall",
        handler: mlockall,
        limits: "nothing is ever swapped out",
    },
    Entry {
        number: linux::__NR_munlockall,
        name: "munlockall",
        handler: munlockall,
        limits: "nothing is ever swapped out",
    },
];

fn protection(bits: u32) -> Result<Protection> {
    if bits & !(linux::PROT_READ | linux::PROT_WRITE | linux::PROT_EXEC | linux::PROT_GROWSDOWN)
        != 0
    {
        return Err(Errno::EINVAL);
    }
    let mut protection = Protection::empty();
    // On x86-64 what can be written or executed can be read.
    if bits & (linux::PROT_READ | linux::PROT_WRITE | linux::PROT_EXEC) != 0 {
        protection |= Protection::READ;
    }
    if bits & linux::PROT_WRITE != 0 {
        protection |= Protection::WRITE;
    }
    if bits & linux::PROT_EXEC != 0 {
        protection |= Protection::EXECUTE;
    }
    Ok(protection)
}

fn mmap(call: &mut Call<'_>) -> Outcome {
    try_mmap(call).into()
}

fn try_mmap(call: &Call<'_>) -> Result<usize> {
    let address = call.raw(0) as usize;
    let length = call.length(1);
    let bits = call.unsigned(2);
    let map = call.unsigned(3);
    let offset = call.raw(5);
    if length == 0 {
        return Err(Errno::EINVAL);
    }
    let length = page_round_up(length).ok_or(Errno::ENOMEM)?;
    let protection = protection(bits)?;
    let kind = map & linux::MAP_TYPE;
    let shared = match kind {
        linux::MAP_PRIVATE => false,
        linux::MAP_SHARED | linux::MAP_SHARED_VALIDATE => true,
        _ => return Err(Errno::EINVAL),
    };
    if map & linux::MAP_HUGETLB != 0 {
        trace::unsupported(
            u64::from(linux::MAP_HUGETLB),
            format_args!("mmap with MAP_HUGETLB"),
        );
        return Err(Errno::ENOMEM);
    }
    tell_of_code_in_place(protection);
    let placement = if map & linux::MAP_FIXED_NOREPLACE != 0 {
        Placement::FixedIfFree(address)
    } else if map & linux::MAP_FIXED != 0 {
        Placement::Fixed(address)
    } else {
        Placement::Anywhere(address)
    };
    let flags = if shared {
        AreaFlags::SHARED
    } else {
        AreaFlags::empty()
    };
    let process = call.process();
    if map & linux::MAP_ANONYMOUS != 0 {
        return process
            .memory
            .lock()
            .map_zero(placement, length, protection, flags);
    }
    if !offset.is_multiple_of(PAGE_SIZE as u64) {
        return Err(Errno::EINVAL);
    }
    offset.checked_add(length as u64).ok_or(Errno::EOVERFLOW)?;
    let file = process.file(call.int(4))?;
    let status = file.flags();
    if !status.readable()
        || (shared && protection.contains(Protection::WRITE) && !status.writable())
    {
        return Err(Errno::EACCES);
    }
    let inode = Arc::clone(file.file.inode().ok_or(Errno::ENODEV)?);
    let mut flags = flags;
    flags.set(AreaFlags::READ_ONLY_FILE, shared && !status.writable());
    if shared && status.writable() {
        match inode.prepare_shared(offset, length as u64) {
            // Where sharing is not offered, mapping decides whether this mapping needs it.
            Ok(()) | Err(Errno::ENODEV) => {}
            Err(error) => return Err(error),
        }
    }
    let path = Arc::from(file.path.as_deref().unwrap_or(""));
    let file = AreaFile {
        inode,
        path,
        offset,
    };
    process
        .memory
        .lock()
        .map_file(placement, length, protection, flags, file)
}

fn munmap(call: &mut Call<'_>) -> Outcome {
    call.process()
        .memory
        .lock()
        .unmap(call.raw(0) as usize, call.length(1))
        .into()
}

/// Says that a program generates code in place, which will be refused: it may end without a word of its own.
fn tell_of_code_in_place(protection: Protection) {
    if protection.contains(Protection::WRITE | Protection::EXECUTE) {
        trace::unsupported(
            u64::from(linux::PROT_EXEC) << 32,
            format_args!(
                "memory that is writable and executable at once; have the program interpret (node runs with --jitless)"
            ),
        );
    }
}

fn mprotect(call: &mut Call<'_>) -> Outcome {
    let protection = match protection(call.unsigned(2)) {
        Ok(protection) => protection,
        Err(error) => return Outcome::fail(error),
    };
    tell_of_code_in_place(protection);
    call.process()
        .memory
        .lock()
        .protect(call.raw(0) as usize, call.length(1), protection)
        .into()
}

fn mremap(call: &mut Call<'_>) -> Outcome {
    let flags = call.unsigned(3);
    if flags & !(linux::MREMAP_MAYMOVE | linux::MREMAP_FIXED) != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    let target = (flags & linux::MREMAP_FIXED != 0).then(|| call.raw(4) as usize);
    let may_move = flags & linux::MREMAP_MAYMOVE != 0;
    if target.is_some() && !may_move {
        return Outcome::fail(Errno::EINVAL);
    }
    let (start, old, new) = (call.raw(0) as usize, call.length(1), call.length(2));
    call.process()
        .memory
        .lock()
        .remap(start, old, new, may_move, target)
        .into()
}

fn madvise(call: &mut Call<'_>) -> Outcome {
    let (start, length, advice) = (call.raw(0) as usize, call.length(1), call.unsigned(2));
    let memory = &call.process().memory;
    match advice {
        linux::MADV_DONTNEED | linux::MADV_DONTNEED_LOCKED | linux::MADV_FREE => {
            memory.lock().discard(start, length).into()
        }
        // Hints: what they ask for is a matter of speed only.
        linux::MADV_NORMAL
        | linux::MADV_RANDOM
        | linux::MADV_SEQUENTIAL
        | linux::MADV_WILLNEED
        | linux::MADV_HUGEPAGE
        | linux::MADV_NOHUGEPAGE
        | linux::MADV_COLD
        | linux::MADV_PAGEOUT
        | linux::MADV_MERGEABLE
        | linux::MADV_UNMERGEABLE
        | linux::MADV_COLLAPSE
        // There is neither fork nor core dump that could see a difference.
        | linux::MADV_DONTFORK
        | linux::MADV_DOFORK
        | linux::MADV_WIPEONFORK
        | linux::MADV_KEEPONFORK
        | linux::MADV_DONTDUMP
        | linux::MADV_DODUMP => {
            if start % PAGE_SIZE != 0 {
                return Outcome::fail(Errno::EINVAL);
            }
            let Some(end) = page_round_up(length).and_then(|length| start.checked_add(length)) else {
                return Outcome::fail(Errno::EINVAL);
            };
            if memory.lock().is_range_mapped(start, end) {
                Outcome::Done(Ok(0))
            } else {
                Outcome::fail(Errno::ENOMEM)
            }
        }
        _ => Outcome::fail(Errno::EINVAL),
    }
}

fn brk(call: &mut Call<'_>) -> Outcome {
    let end = call.process().memory.lock().move_heap(call.raw(0) as usize);
    Outcome::Done(Ok(end as u64))
}

fn msync(call: &mut Call<'_>) -> Outcome {
    let (start, length, flags) = (call.raw(0) as usize, call.length(1), call.unsigned(2));
    if start % PAGE_SIZE != 0
        || flags & !(linux::MS_ASYNC | linux::MS_SYNC | linux::MS_INVALIDATE) != 0
    {
        return Outcome::fail(Errno::EINVAL);
    }
    let Some(end) = page_round_up(length).and_then(|length| start.checked_add(length)) else {
        return Outcome::fail(Errno::ENOMEM);
    };
    let inodes: alloc::vec::Vec<_> = {
        let memory = call.process().memory.lock();
        if !memory.is_range_mapped(start, end) {
            return Outcome::fail(Errno::ENOMEM);
        }
        memory
            .areas()
            .filter(|area| {
                area.start < end && area.end > start && area.flags.contains(AreaFlags::SHARED)
            })
            .filter_map(|area| area.file.as_ref().map(|file| Arc::clone(&file.inode)))
            .collect()
    };
    for inode in inodes {
        if let Err(error) = inode.synchronize(true) {
            return Outcome::fail(error);
        }
    }
    Outcome::Done(Ok(0))
}

fn mincore(call: &mut Call<'_>) -> Outcome {
    let (start, length) = (call.raw(0) as usize, call.length(1));
    let Some(end) = page_round_up(length).and_then(|length| start.checked_add(length)) else {
        return Outcome::fail(Errno::ENOMEM);
    };
    if start % PAGE_SIZE != 0 {
        return Outcome::fail(Errno::EINVAL);
    }
    if !call.process().memory.lock().is_range_mapped(start, end) {
        return Outcome::fail(Errno::ENOMEM);
    }
    let pages = (end - start) / PAGE_SIZE;
    const ONES: [u8; 256] = [1; 256];
    for first in (0..pages).step_by(ONES.len()) {
        let count = (pages - first).min(ONES.len());
        if let Err(error) = user::write_bytes(call.raw(2) + first as u64, &ONES[..count]) {
            return Outcome::fail(error);
        }
    }
    Outcome::Done(Ok(0))
}

fn mlock(call: &mut Call<'_>) -> Outcome {
    let start = call.raw(0) as usize & !(PAGE_SIZE - 1);
    let end = (call.raw(0) as usize)
        .checked_add(call.length(1))
        .and_then(page_round_up);
    match end {
        Some(end) if call.process().memory.lock().is_range_mapped(start, end) => {
            Outcome::Done(Ok(0))
        }
        _ => Outcome::fail(Errno::ENOMEM),
    }
}

fn mlockall(call: &mut Call<'_>) -> Outcome {
    let known = linux::MCL_CURRENT | linux::MCL_FUTURE | linux::MCL_ONFAULT;
    let flags = call.unsigned(0);
    if flags == 0 || flags & !known != 0 {
        Outcome::fail(Errno::EINVAL)
    } else {
        Outcome::Done(Ok(0))
    }
}

fn munlockall(_: &mut Call<'_>) -> Outcome {
    Outcome::Done(Ok(0))
}
