//! Devices: what the link and the network run over on each engine.

use alloc::{boxed::Box, format, string::String, sync::Arc};

use kiln_abi::host::{BootInformation, Engine};

use crate::{
    Kernel,
    link::{ByteStream, DescriptorStream},
    net::FrameDevice,
};

/// The byte stream to the monitor.
///
/// # Errors
/// In words, when the engine has none although the run's configuration says that there is a monitor.
pub fn link(kernel: &Arc<Kernel>, boot: &'static BootInformation) -> Result<Arc<dyn ByteStream>, String> {
    match kernel.engine {
        Engine::Process => {
            let stream = DescriptorStream::new(kernel.host, boot.link_descriptor)
                .map_err(|error| format!("the link to the monitor cannot be used: {error}"))?;
            Ok(Arc::new(stream))
        }
        Engine::Vm => Err("there is no virtio console for the link to the monitor".into()),
    }
}

/// The network device, if there is one.
///
/// # Errors
/// In words, when there is one that cannot be used.
pub fn network(
    kernel: &Arc<Kernel>,
    boot: &'static BootInformation,
) -> Result<Option<Box<dyn FrameDevice>>, String> {
    let _ = (kernel, boot);
    Ok(None)
}
