// Search when the site is opened as files: browsers start no worker from a file, so the worker's
// script runs in a hidden frame.
if (location.protocol === 'file:') window.Worker = class extends EventTarget {
  constructor(url) {
    super()
    this.frame = document.body.appendChild(document.createElement('iframe'))
    this.frame.hidden = true
    const inside = this.frame.contentWindow
    window.addEventListener('message', event => {
      if (event.source !== inside) return
      this.dispatchEvent(new MessageEvent('message', {data: event.data}))
    })
    this.ready = new Promise(loaded => { inside.frameLoaded = loaded })
    inside.document.open()
    inside.document.write(`
      <script>postMessage = message => parent.postMessage(message, '*')</script>
      <script src="${url}" onload="frameLoaded()"></script>`)
    inside.document.close()
  }
  postMessage(data) {
    const message = new MessageEvent('message', {data})
    this.ready.then(() => this.frame.contentWindow.dispatchEvent(message))
  }
  terminate() { this.frame.remove() }
}
