//! Sizes: what Kiln adds to a program.

use std::{fs, path::Path, process::Command, time::Duration};

use kiln_tests::{Kiln, run};

use crate::server;

/// Prints the pieces of the example site's image.
pub fn measure() {
    let kiln = Kiln::new();
    let image = server::site_image(&kiln);
    let whole = fs::metadata(&image).map_or(0, |metadata| metadata.len());
    let sections = run(
        Command::new("readelf").arg("-SW").arg(&image),
        Duration::from_secs(10),
    )
    .output;
    let mut kernel_and_shim = 0;
    for line in sections.lines() {
        let fields: Vec<&str> = line
            .rsplit(']')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        // Name, type, address, offset, size.
        if let [name, _, _, _, size, ..] = fields[..]
            && name.starts_with(".kiln.")
        {
            let size = u64::from_str_radix(size, 16).unwrap_or(0);
            println!("{name:16} {size:9} bytes");
            if name == ".kiln.kernel" || name == ".kiln.shim" {
                kernel_and_shim += size;
            }
        }
    }
    let process_shim = kiln_guest::PROCESS_SHIM.len();
    println!("(shim of engine process, in the command: {process_shim} bytes)");
    let files = tree_size(&server::site());
    println!(
        "kernel and shim: {kernel_and_shim} bytes (allowed: {})",
        1 << 20
    );
    println!(
        "image: {whole} bytes, of which the site's files {files}; the rest {} (allowed: {})",
        whole.saturating_sub(files),
        4 << 20
    );
}

/// Bytes of all files below a folder.
fn tree_size(folder: &Path) -> u64 {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => tree_size(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}
