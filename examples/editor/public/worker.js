// Keeps the page itself, so that it opens when nobody answers. Everything else goes to the stack as if this were not here.
addEventListener('install', (event) => {
  skipWaiting()
  event.waitUntil(first())
})
addEventListener('activate', (event) => event.waitUntil(clients.claim()))

addEventListener('fetch', (event) => {
  const { request } = event
  const { origin, pathname } = new URL(request.url)
  if (request.method !== 'GET' || origin !== location.origin) return
  if (pathname === '/') event.respondWith(newest(request))
  else if (pathname.startsWith('/assets/')) event.respondWith(kept(request))
})

/** The page that brought this script was loaded without it. */
async function first() {
  const answer = await newest('/')
  const named = (await answer.text()).matchAll(/(?:src|href)="\.?\/?(assets\/[^"]+)"/g)
  await Promise.all(Array.from(named, ([, path]) => kept(new Request(`/${path}`))))
}

/** The page as the stack has it now; what was kept where nobody answers. */
async function newest(request) {
  const cache = await caches.open('editor')
  try {
    const answer = await fetch(request)
    // While the page is being built another one stands in its place.
    if (answer.ok && answer.headers.has('x-editor-page')) await keepPage(cache, answer.clone())
    return answer
  } catch (error) {
    const page = await cache.match('/')
    if (page) return page
    throw error
  }
}

/** Another page has other assets: those of the one before go. */
async function keepPage(cache, answer) {
  const [now, before] = [await answer.clone().text(), await (await cache.match('/'))?.text()]
  if (now === before) return
  for (const request of await cache.keys()) {
    if (new URL(request.url).pathname.startsWith('/assets/')) await cache.delete(request)
  }
  await cache.put('/', answer)
}

/** An asset never changes: its name is its content's. */
async function kept(request) {
  const cache = await caches.open('editor')
  const found = await cache.match(request)
  if (found) return found
  const answer = await fetch(request)
  if (answer.ok) await cache.put(request, answer.clone())
  return answer
}
